#include "checkpoint/safetensors_header.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"

namespace winnow {
namespace {

constexpr char kDamagedHint[] = "the file is damaged or was cut off; fetch or write it again";

// Accepts exactly the grammar of a header and nothing nested deeper, so a hostile header stops the
// parser at its first wrong token. Duplicate tensor names are found afterwards by sorting.
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return Unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t& text) override {
    return Unexpected(fmt::format("the number {}", text.substr(0, 40)));
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::kShape) {
      if (value > static_cast<uint64_t>(INT64_MAX)) return Fail("a dimension of its shape is above 2^63");
      if (tensors_.back().shape.size() == kMaxTensorRank) {
        return Fail(fmt::format("its shape has more than {} dimensions", kMaxTensorRank));
      }
      tensors_.back().shape.push_back(value);
      return true;
    }
    if (state_ == State::kOffsets) {
      if (num_offsets_ == 2) return Fail("data_offsets has more than two numbers");
      // Kept as (begin, end) until the layout is checked.
      (num_offsets_++ == 0 ? tensors_.back().file_offset : tensors_.back().bytes) = value;
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadataValue) {
      metadata_[metadata_key_] = value;
      state_ = State::kMetadata;
      return true;
    }
    if (state_ == State::kDtype) {
      const std::optional<Dtype> dtype = DtypeFromName(value);
      if (!dtype) {
        return Fail(fmt::format("unknown dtype {}, expected one safetensors defines (F32, BF16, ...)",
                                QuotedName(value)));
      }
      tensors_.back().dtype = *dtype;
      state_ = State::kEntry;
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(std::size_t) override {
    switch (state_) {
      case State::kStart: state_ = State::kTop; return true;
      case State::kMetadataStart: state_ = State::kMetadata; return true;
      case State::kEntryStart: state_ = State::kEntry; return true;
      default: return Unexpected("an object");
    }
  }

  bool key(string_t& name) override {
    switch (state_) {
      case State::kTop: return StartMember(name);
      case State::kMetadata:
        if (metadata_.contains(name)) {
          return Fail(fmt::format("__metadata__ has {} twice", QuotedName(name)));
        }
        metadata_key_ = name;
        state_ = State::kMetadataValue;
        return true;
      case State::kEntry:
        if (name == "dtype") return StartField(has_dtype_, State::kDtype, name);
        if (name == "shape") return StartField(has_shape_, State::kShapeStart, name);
        if (name == "data_offsets") return StartField(has_offsets_, State::kOffsetsStart, name);
        return Fail(fmt::format("unknown key {}, expected dtype, shape, data_offsets",
                                QuotedName(name)));
      default: return Unexpected("a key");
    }
  }

  bool end_object() override {
    if (state_ == State::kEntry) {
      if (!has_dtype_) return Fail("has no dtype");
      if (!has_shape_) return Fail("has no shape");
      if (!has_offsets_) return Fail("has no data_offsets");
    }
    in_tensor_ = false;
    state_ = state_ == State::kTop ? State::kEnd : State::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (state_ == State::kShapeStart) {
      state_ = State::kShape;
      return true;
    }
    if (state_ == State::kOffsetsStart) {
      state_ = State::kOffsets;
      return true;
    }
    return Unexpected("an array");
  }

  bool end_array() override {
    if (state_ == State::kOffsets && num_offsets_ != 2) {
      return Fail(fmt::format("data_offsets has {} numbers, expected 2", num_offsets_));
    }
    state_ = State::kEntry;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& e) override {
    std::string what = e.what();
    if (const size_t start = what.find("syntax error"); start != std::string::npos) {
      what = what.substr(start);
    }
    problem_ = fmt::format("the header is not valid JSON at byte {}: {}", position,
                           DumpJson(Json(what.substr(0, 300))));
    return false;
  }

  const std::string& problem() const { return problem_; }
  std::vector<TensorInfo>& tensors() { return tensors_; }
  std::map<std::string, std::string>& metadata() { return metadata_; }

 private:
  enum class State {
    kStart, kTop, kEnd, kMetadataStart, kMetadata, kMetadataValue, kEntryStart, kEntry, kDtype,
    kShapeStart, kShape, kOffsetsStart, kOffsets,
  };

  bool StartMember(const std::string& name) {
    if (name == "__metadata__") {
      if (std::exchange(has_metadata_, true)) return Fail("__metadata__ appears twice");
      state_ = State::kMetadataStart;
      return true;
    }
    if (const std::string problem = TensorNameProblem(name); !problem.empty()) {
      return Fail(fmt::format("tensor name {} {}", QuotedName(name), problem));
    }
    if (tensors_.size() == kMaxTensorCount) {
      return Fail(fmt::format("more than {} tensors", FormatCount(kMaxTensorCount)));
    }
    tensors_.emplace_back().name = name;
    in_tensor_ = true;
    has_dtype_ = has_shape_ = has_offsets_ = false;
    num_offsets_ = 0;
    state_ = State::kEntryStart;
    return true;
  }

  bool StartField(bool& seen, State next, const std::string& name) {
    if (std::exchange(seen, true)) return Fail(fmt::format("has {} twice", name));
    state_ = next;
    return true;
  }

  bool Unexpected(std::string_view got) {
    switch (state_) {
      case State::kStart: return Fail(fmt::format("the header is {}, expected an object", got));
      case State::kMetadataStart:
        return Fail(fmt::format("__metadata__ is {}, expected an object of strings", got));
      case State::kMetadataValue:
        return Fail(fmt::format("__metadata__ {} is {}, expected a string",
                                QuotedName(metadata_key_), got));
      case State::kEntryStart: return Fail(fmt::format("is {}, expected an object", got));
      case State::kDtype: return Fail(fmt::format("its dtype is {}, expected a string", got));
      case State::kShapeStart:
        return Fail(fmt::format("its shape is {}, expected an array of integers", got));
      case State::kShape:
        return Fail(fmt::format("its shape holds {}, expected non-negative integers", got));
      case State::kOffsetsStart:
        return Fail(fmt::format("its data_offsets is {}, expected two integers", got));
      case State::kOffsets:
        return Fail(fmt::format("its data_offsets holds {}, expected two non-negative integers", got));
      default: return Fail(fmt::format("unexpected {}", got));
    }
  }

  bool Fail(const std::string& problem) {
    problem_ = in_tensor_ && !tensors_.empty()
                   ? fmt::format("tensor {}: {}", QuotedName(tensors_.back().name), problem)
                   : problem;
    return false;
  }

  State state_ = State::kStart;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
  std::string metadata_key_;
  std::string problem_;
  int num_offsets_ = 0;
  bool in_tensor_ = false;
  bool has_metadata_ = false;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
};

// Turns (begin, end) relative to the data into (file offset, bytes) and checks that the tensors cover
// the data exactly.
void CheckLayout(std::vector<TensorInfo>& tensors, uint64_t data_start, uint64_t data_bytes,
                 const std::string& where) {
  for (const TensorInfo& tensor : tensors) {
    const uint64_t begin = tensor.file_offset;
    const uint64_t end = tensor.bytes;
    if (end < begin) {
      throw ModelError(fmt::format("{}: tensor {}: data_offsets [{}, {}] end before they begin", where,
                                   QuotedName(tensor.name), begin, end));
    }
    const uint64_t expected = TensorBytes(tensor, where);
    if (end - begin != expected) {
      throw ModelError(fmt::format("{}: tensor {}: {} needs {} bytes, data_offsets [{}, {}] give {}",
                                   where, QuotedName(tensor.name), tensor.Describe(), expected, begin,
                                   end, end - begin));
    }
    if (end > data_bytes) {
      throw ModelError(fmt::format("{}: tensor {}: ends at byte {} of the data, the file has {}", where,
                                   QuotedName(tensor.name), end, data_bytes),
                       kDamagedHint);
    }
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.file_offset, a.bytes) < std::pair(b.file_offset, b.bytes);
  });
  uint64_t previous_end = 0;
  for (TensorInfo& tensor : tensors) {
    const uint64_t begin = tensor.file_offset;
    if (begin != previous_end) {
      throw ModelError(fmt::format("{}: tensor {}: begins at byte {} of the data, expected {} ({})",
                                   where, QuotedName(tensor.name), begin, previous_end,
                                   begin > previous_end ? "a hole" : "it overlaps another tensor"));
    }
    previous_end = tensor.bytes;
    tensor.bytes = previous_end - begin;
    tensor.file_offset = data_start + begin;
  }
  if (previous_end != data_bytes) {
    throw ModelError(fmt::format("{}: {} bytes after the last tensor belong to none (data of {} bytes, "
                                 "tensors end at {})",
                                 where, data_bytes - previous_end, data_bytes, previous_end),
                     kDamagedHint);
  }
}

}  // namespace

std::string QuotedName(std::string_view name) {
  constexpr size_t kShown = 120;
  std::string shown = DumpJson(Json(std::string(name.substr(0, kShown))));
  if (name.size() > kShown) shown += fmt::format("... ({} bytes)", name.size());
  return shown;
}

std::string TensorNameProblem(std::string_view name) {
  if (name.empty()) return "is empty";
  if (name.size() > kMaxTensorNameBytes) {
    return fmt::format("is longer than {} bytes", kMaxTensorNameBytes);
  }
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return "has a control character";
    if (c == '\\') return "has a backslash";
  }
  if (name.front() == '/') return "starts with /";
  if (name.find("..") != std::string_view::npos) return "contains \"..\"";
  return {};
}

uint64_t TensorBytes(const TensorInfo& tensor, const std::string& where) {
  uint64_t bits = DtypeBits(tensor.dtype);
  for (const uint64_t dimension : tensor.shape) {
    if (__builtin_mul_overflow(bits, dimension, &bits)) {
      throw ModelError(fmt::format("{}: tensor {}: the size of {} does not fit in 64 bits", where,
                                   QuotedName(tensor.name), tensor.Describe()));
    }
  }
  if (bits % 8 != 0) {
    throw ModelError(fmt::format("{}: tensor {}: {} is no whole number of bytes", where,
                                 QuotedName(tensor.name), tensor.Describe()));
  }
  return bits / 8;
}

void CheckSafetensorsLength(uint64_t length, uint64_t file_bytes, const std::string& where) {
  if (file_bytes < 8) {
    throw ModelError(fmt::format("{}: no safetensors file: {} bytes, expected at least 8", where,
                                 file_bytes),
                     kDamagedHint);
  }
  if (length > kMaxSafetensorsHeaderBytes) {
    throw ModelError(fmt::format("{}: no safetensors file: it claims a header of {} bytes, the format's "
                                 "limit is {}",
                                 where, length, kMaxSafetensorsHeaderBytes));
  }
  if (length > file_bytes - 8) {
    throw ModelError(fmt::format("{}: its header of {} bytes does not fit in the file of {} bytes", where,
                                 length, file_bytes),
                     kDamagedHint);
  }
}

SafetensorsHeader ParseSafetensorsHeader(std::string_view json, uint64_t file_bytes,
                                         const std::string& where) {
  CheckSafetensorsLength(json.size(), file_bytes, where);
  if (json.empty() || json.front() != '{') {
    throw ModelError(fmt::format("{}: no safetensors file: its header does not start with {{", where));
  }
  // The JSON parser takes a zero byte for the end of its input.
  if (const size_t zero = json.find('\0'); zero != std::string_view::npos) {
    throw ModelError(fmt::format("{}: zero byte in the header at byte {}", where, zero), kDamagedHint);
  }
  HeaderReader reader;
  if (!Json::sax_parse(json.data(), json.data() + json.size(), &reader)) {
    throw ModelError(fmt::format("{}: {}", where, reader.problem()), kDamagedHint);
  }
  SafetensorsHeader header;
  header.tensors = std::move(reader.tensors());
  header.metadata = std::move(reader.metadata());
  CheckLayout(header.tensors, 8 + json.size(), file_bytes - 8 - json.size(), where);

  header.by_name.resize(header.tensors.size());
  std::iota(header.by_name.begin(), header.by_name.end(), 0u);
  std::sort(header.by_name.begin(), header.by_name.end(), [&](uint32_t a, uint32_t b) {
    return header.tensors[a].name < header.tensors[b].name;
  });
  const auto duplicate = std::adjacent_find(
      header.by_name.begin(), header.by_name.end(), [&](uint32_t a, uint32_t b) {
        return header.tensors[a].name == header.tensors[b].name;
      });
  if (duplicate != header.by_name.end()) {
    throw ModelError(fmt::format("{}: tensor {} appears twice", where,
                                 QuotedName(header.tensors[*duplicate].name)));
  }
  return header;
}

}  // namespace winnow
