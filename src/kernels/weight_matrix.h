// A view of a weight matrix as stored: [rows, cols] = [out, in], row-major, in F32, F16 or BF16; or
// packed in few bits (base/packed_format.h); or of keys and values in a cache, whose rows are a
// part of longer ones. Kernels widen it to f32 a tile at a time; the bytes are never converted as a
// whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"          // Dtype
#include "base/packed_format.h"  // PackedFormat

namespace winnow {

struct WeightMatrix {
  const std::byte* data = nullptr;  // aligned to the element at least
  int64_t rows = 0;
  int64_t cols = 0;
  Dtype dtype = Dtype::kF32;
  int64_t row_stride = 0;    // elements from one row to the next; 0: cols, rows follow each other
  PackedFormat packed = {};  // not empty: `data` is packed, dtype U8 and row_stride 0

  int64_t stride() const { return row_stride == 0 ? cols : row_stride; }
  bool empty() const { return data == nullptr; }
  uint64_t bytes() const {
    if (!packed.empty()) return PackedBytes(packed, rows, cols);
    return static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols) * (DtypeBits(dtype) / 8);
  }
};

}  // namespace winnow
