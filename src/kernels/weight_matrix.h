// A view of a weight matrix as stored: [rows, cols] = [out, in], row-major, in F32, F16 or BF16.
// Kernels widen it to f32 a tile at a time; the bytes are never converted as a whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"  // Dtype

namespace winnow {

struct WeightMatrix {
  const std::byte* data = nullptr;  // aligned to the element at least
  int64_t rows = 0;
  int64_t cols = 0;
  Dtype dtype = Dtype::kF32;

  bool empty() const { return data == nullptr; }
  uint64_t bytes() const {
    return static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols) * (DtypeBits(dtype) / 8);
  }
};

}  // namespace winnow
