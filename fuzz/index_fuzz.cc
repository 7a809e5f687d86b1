// model.safetensors.index.json: either refused with a ModelError, or only plain file names come
// out.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "checkpoint/shard_index.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  try {
    const ShardIndex index =
        ParseShardIndex(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz");
    for (const std::string& file : index.files) {
      if (file.empty() || file.find('/') != std::string::npos || file.front() == '.') std::abort();
    }
    for (const auto& [tensor, file] : index.weight_map) {
      if (tensor.empty() || file >= index.files.size()) std::abort();
    }
  } catch (const ModelError&) {
  }
  return 0;
}
