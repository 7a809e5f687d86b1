// The JSON header of a safetensors file, checked against the size of the file it came from. Apart
// from SafetensorsFile so that it can be fuzzed without files. Throws ModelError.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/tensor_info.h"  // TensorInfo

namespace winnow {

// The format's own limit; the file's size bounds it further before anything is allocated.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;
inline constexpr size_t kMaxTensorRank = 8;
inline constexpr size_t kMaxTensorNameBytes = 1'000;
inline constexpr size_t kMaxTensorCount = 4'000'000;

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in file order, offsets from the start of the file
  std::vector<uint32_t> by_name;    // indices into tensors, sorted by name
  std::map<std::string, std::string> metadata;
};

// Checks the length field against the file's size: at least a length, no more than the format's
// limit, no more than the file has. `length` is what the first 8 bytes say.
void CheckSafetensorsLength(uint64_t length, uint64_t file_bytes, const std::string& where);

// `json` is the header without its length, `file_bytes` the size of the whole file. Every byte
// after the header must belong to exactly one tensor.
SafetensorsHeader ParseSafetensorsHeader(std::string_view json, uint64_t file_bytes,
                                         const std::string& where);

// Why `name` is no tensor name ("is empty", ...), or empty if it is one. Names that could leave a
// folder if a tool wrote tensors to files by name are refused: no checkpoint has them.
std::string TensorNameProblem(std::string_view name);

// A name that came from a file, shortened and without control characters, for messages.
std::string QuotedName(std::string_view name);

// Bytes of a dense tensor. ModelError naming `where` and the tensor if they do not fit 64 bits or
// are no whole number (packed 4- and 6-bit formats).
uint64_t TensorBytes(const TensorInfo& tensor, const std::string& where);

}  // namespace winnow
