#include "checkpoint/safetensors_header.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "checkpoint/safetensors_grammar.h"

namespace winnow {
namespace {

constexpr char kDamagedHint[] = "the file is damaged or was cut off; fetch or write it again";

// Turns (begin, end) relative to the data into (file offset, bytes) and checks that the tensors
// cover the data exactly.
void CheckLayout(std::vector<TensorInfo>& tensors, uint64_t data_start, uint64_t data_bytes,
                 const std::string& where) {
  for (const TensorInfo& tensor : tensors) {
    const uint64_t begin = tensor.file_offset;
    const uint64_t end = tensor.bytes;
    if (end < begin) {
      throw ModelError(fmt::format("{}: tensor {}: data_offsets [{}, {}] end before they begin",
                                   where, QuotedName(tensor.name), begin, end));
    }
    const uint64_t expected = TensorBytes(tensor, where);
    if (end - begin != expected) {
      throw ModelError(fmt::format(
          "{}: tensor {}: {} needs {} bytes, data_offsets [{}, {}] give {}", where,
          QuotedName(tensor.name), tensor.Describe(), expected, begin, end, end - begin));
    }
    if (end > data_bytes) {
      throw ModelError(fmt::format("{}: tensor {}: ends at byte {} of the data, the file has {}",
                                   where, QuotedName(tensor.name), end, data_bytes),
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
    throw ModelError(
        fmt::format("{}: {} bytes after the last tensor belong to none (data of {} bytes, "
                    "tensors end at {})",
                    where, data_bytes - previous_end, data_bytes, previous_end),
        kDamagedHint);
  }
}

}  // namespace

std::string QuotedName(std::string_view name) {
  constexpr size_t kShown = 200;
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
    throw ModelError(
        fmt::format("{}: no safetensors file: {} bytes, expected at least 8", where, file_bytes),
        kDamagedHint);
  }
  if (length > kMaxSafetensorsHeaderBytes) {
    throw ModelError(
        fmt::format("{}: no safetensors file: it claims a header of {} bytes, the format's "
                    "limit is {}",
                    where, length, kMaxSafetensorsHeaderBytes));
  }
  if (length > file_bytes - 8) {
    throw ModelError(fmt::format("{}: its header of {} bytes does not fit in the file of {} bytes",
                                 where, length, file_bytes),
                     kDamagedHint);
  }
}

SafetensorsHeader ParseSafetensorsHeader(std::string_view json, uint64_t file_bytes,
                                         const std::string& where) {
  CheckSafetensorsLength(json.size(), file_bytes, where);
  if (json.empty() || json.front() != '{') {
    throw ModelError(
        fmt::format("{}: no safetensors file: its header does not start with {{", where));
  }
  SafetensorsMembers members = ParseSafetensorsMembers(json, where);
  SafetensorsHeader header;
  header.tensors = std::move(members.tensors);
  header.metadata = std::move(members.metadata);
  CheckLayout(header.tensors, 8 + json.size(), file_bytes - 8 - json.size(), where);

  header.by_name.resize(header.tensors.size());
  std::iota(header.by_name.begin(), header.by_name.end(), 0u);
  std::sort(header.by_name.begin(), header.by_name.end(), [&](uint32_t a, uint32_t b) {
    return header.tensors[a].name < header.tensors[b].name;
  });
  const auto duplicate = std::adjacent_find(
      header.by_name.begin(), header.by_name.end(),
      [&](uint32_t a, uint32_t b) { return header.tensors[a].name == header.tensors[b].name; });
  if (duplicate != header.by_name.end()) {
    throw ModelError(fmt::format("{}: tensor {} appears twice", where,
                                 QuotedName(header.tensors[*duplicate].name)));
  }
  return header;
}

}  // namespace winnow
