#include "checkpoint/safetensors_grammar.h"

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "base/units.h"
#include "checkpoint/safetensors_header.h"

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
      if (value > uint64_t{INT64_MAX}) {
        return Fail(fmt::format("its shape holds {}, dimensions are below 2^63", value));
      }
      if (members_.tensors.back().shape.size() == kMaxTensorRank) {
        return Fail(fmt::format("its shape has more than {} dimensions", kMaxTensorRank));
      }
      members_.tensors.back().shape.push_back(value);
      return true;
    }
    if (state_ == State::kOffsets) {
      if (num_offsets_ == 2) return Fail("data_offsets has more than two numbers");
      // Kept as (begin, end) until the layout is checked.
      (num_offsets_++ == 0 ? members_.tensors.back().file_offset : members_.tensors.back().bytes) =
          value;
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadataValue) {
      members_.metadata[metadata_key_] = value;
      state_ = State::kMetadata;
      return true;
    }
    if (state_ == State::kDtype) {
      const std::optional<Dtype> dtype = DtypeFromName(value);
      if (!dtype) {
        hint_ = "the file is damaged or uses a format that this version does not know";
        return Fail(
            fmt::format("unknown dtype {}, expected one safetensors defines (F32, BF16, ...)",
                        QuotedName(value)));
      }
      members_.tensors.back().dtype = *dtype;
      state_ = State::kEntry;
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(std::size_t) override {
    switch (state_) {
      case State::kStart:
        state_ = State::kTop;
        return true;
      case State::kMetadataStart:
        state_ = State::kMetadata;
        return true;
      case State::kEntryStart:
        state_ = State::kEntry;
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool key(string_t& name) override {
    switch (state_) {
      case State::kTop:
        return StartMember(name);
      case State::kMetadata:
        if (members_.metadata.contains(name)) {
          return Fail(fmt::format("__metadata__ has {} twice", QuotedName(name)));
        }
        metadata_key_ = name;
        state_ = State::kMetadataValue;
        return true;
      case State::kEntry:
        if (name == "dtype") return StartField(has_dtype_, State::kDtype, name);
        if (name == "shape") return StartField(has_shape_, State::kShapeStart, name);
        if (name == "data_offsets") return StartField(has_offsets_, State::kOffsetsStart, name);
        return Fail(
            fmt::format("unknown key {}, expected dtype, shape, data_offsets", QuotedName(name)));
      default:
        return Unexpected("a key");
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
    // What was read last is quoted in the parser's message and may hold anything.
    problem_ =
        fmt::format("the header is not valid JSON at byte {}: {}", position, QuotedName(what));
    return false;
  }

  const std::string& problem() const { return problem_; }
  const std::string& hint() const { return hint_; }
  SafetensorsMembers& members() { return members_; }

 private:
  enum class State {
    kStart,
    kTop,
    kEnd,
    kMetadataStart,
    kMetadata,
    kMetadataValue,
    kEntryStart,
    kEntry,
    kDtype,
    kShapeStart,
    kShape,
    kOffsetsStart,
    kOffsets,
  };

  bool StartMember(const std::string& name) {
    if (name == "__metadata__") {
      if (std::exchange(has_metadata_, true)) return Fail("__metadata__ appears twice");
      state_ = State::kMetadataStart;
      return true;
    }
    if (const std::string problem = TensorNameProblem(name); !problem.empty()) {
      hint_ = "no tool writes such a name; do not trust the file";
      return Fail(fmt::format("tensor name {} {}", QuotedName(name), problem));
    }
    if (members_.tensors.size() == kMaxTensorCount) {
      return Fail(fmt::format("more than {} tensors", FormatCount(kMaxTensorCount)));
    }
    members_.tensors.emplace_back().name = name;
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
      case State::kStart:
        return Fail(fmt::format("the header is {}, expected an object", got));
      case State::kMetadataStart:
        return Fail(fmt::format("__metadata__ is {}, expected an object of strings", got));
      case State::kMetadataValue:
        return Fail(fmt::format("__metadata__ {} is {}, expected a string",
                                QuotedName(metadata_key_), got));
      case State::kEntryStart:
        return Fail(fmt::format("is {}, expected an object", got));
      case State::kDtype:
        return Fail(fmt::format("its dtype is {}, expected a string", got));
      case State::kShapeStart:
        return Fail(fmt::format("its shape is {}, expected an array of integers", got));
      case State::kShape:
        return Fail(fmt::format("its shape holds {}, expected non-negative integers", got));
      case State::kOffsetsStart:
        return Fail(fmt::format("its data_offsets is {}, expected two integers", got));
      case State::kOffsets:
        return Fail(
            fmt::format("its data_offsets holds {}, expected two non-negative integers", got));
      default:
        return Fail(fmt::format("unexpected {}", got));
    }
  }

  bool Fail(const std::string& problem) {
    problem_ = in_tensor_ && !members_.tensors.empty()
                   ? fmt::format("tensor {}: {}", QuotedName(members_.tensors.back().name), problem)
                   : problem;
    return false;
  }

  State state_ = State::kStart;
  SafetensorsMembers members_;
  std::string metadata_key_;
  std::string problem_;
  std::string hint_ = kDamagedHint;
  int num_offsets_ = 0;
  bool in_tensor_ = false;
  bool has_metadata_ = false;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
};

}  // namespace

SafetensorsMembers ParseSafetensorsMembers(std::string_view json, const std::string& where) {
  // The JSON parser takes a zero byte for the end of its input.
  if (const size_t zero = json.find('\0'); zero != std::string_view::npos) {
    throw ModelError(fmt::format("{}: zero byte in the header at byte {}", where, zero),
                     kDamagedHint);
  }
  HeaderReader reader;
  if (!Json::sax_parse(json.data(), json.data() + json.size(), &reader)) {
    throw ModelError(fmt::format("{}: {}", where, reader.problem()), reader.hint());
  }
  return std::move(reader.members());
}

}  // namespace winnow
