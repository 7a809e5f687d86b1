// A safetensors file as bytes: either refused with a ModelError, or its tensors tile the data
// exactly.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "base/error.h"
#include "checkpoint/safetensors_header.h"
#include "checkpoint/safetensors_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  uint64_t length = 0;
  if (size >= 8) std::memcpy(&length, data, 8);
  // Mutations that change a header's length seldom fix its length field: the bytes as a header
  // alone.
  for (const uint64_t data_bytes : {0, 48}) {
    try {
      ParseSafetensorsHeader(std::string_view(reinterpret_cast<const char*>(data), size),
                             8 + size + data_bytes, "fuzz");
    } catch (const ModelError&) {
    }
  }
  try {
    CheckSafetensorsLength(length, size, "fuzz");
    const std::string_view json(reinterpret_cast<const char*>(data) + 8,
                                static_cast<size_t>(length));
    SafetensorsHeader header = ParseSafetensorsHeader(json, size, "fuzz");
    uint64_t end = 8 + length;
    for (const TensorInfo& tensor : header.tensors) {
      if (tensor.file_offset != end) std::abort();
      end += tensor.bytes;
    }
    if (end != size) std::abort();
    // What was accepted can be written, and reads back the same.
    const std::string written = LayOutSafetensors(header.tensors, header.metadata);
    const SafetensorsHeader again = ParseSafetensorsHeader(
        std::string_view(written).substr(8), written.size() + (size - 8 - length), "fuzz");
    if (again.tensors.size() != header.tensors.size()) std::abort();
  } catch (const ModelError&) {
  }
  return 0;
}
