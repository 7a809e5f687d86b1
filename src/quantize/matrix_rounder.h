// Rounds stored matrices in pieces of rows, so that f32 copies stay small: what rounding with and
// without statistics and the measurement of errors share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/packed_format.h"     // PackedFormat
#include "base/thread_pool.h"       // ThreadPool
#include "kernels/weight_matrix.h"  // WeightMatrix
#include "quantize/rounding.h"      // InputFactor

namespace winnow {

// How a matrix is rounded: compensated if there is a factor, else plainly with weights of its
// columns (empty: all alike).
struct RoundingInputs {
  std::optional<InputFactor> factor;
  std::vector<double> column_weight;
};

class MatrixRounder {
 public:
  explicit MatrixRounder(ThreadPool& pool) : pool_(pool) {}

  // The whole matrix, PackedBytes of it. A ModelError is given `name` to say which matrix it means.
  AlignedBuffer<std::byte> Round(const WeightMatrix& w, const PackedFormat& format,
                                 const RoundingInputs& inputs, const std::string& name);

  // Rows [first, first + rows) of `w` into `to`, PackedBytes of them. `named_row` is what messages
  // call the first of them.
  void RoundRows(const WeightMatrix& w, int64_t first, int64_t rows, int64_t named_row,
                 const PackedFormat& format, const RoundingInputs& inputs, const std::string& name,
                 std::byte* to);

  // What it holds for the widest matrix of `cols` columns, besides the result.
  static uint64_t Bytes(int64_t cols);

 private:
  ThreadPool& pool_;
  std::vector<float> values_;
};

}  // namespace winnow
