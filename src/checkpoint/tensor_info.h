// One tensor as a safetensors header describes it: name, format, shape and where its bytes lie.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"  // Dtype

namespace winnow {

struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<uint64_t> shape;  // [] is a scalar
  uint64_t file_offset = 0;     // from the start of the file, header included
  uint64_t bytes = 0;
  int32_t shard = 0;  // index into Checkpoint::shards()

  // "BF16 [4, 8]", for messages.
  std::string Describe() const;
};

}  // namespace winnow
