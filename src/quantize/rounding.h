// Rounds a weight matrix to a packed format: scales are searched, not taken from the largest
// weight, and with the second moments of a layer's inputs each column's error is made up for by the
// columns after it. Called for every matrix of a quantised checkpoint. The same bytes for any
// number of threads. ModelError if a weight is not finite or too large for a scale in f16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/packed_format.h"  // PackedFormat
#include "base/thread_pool.h"    // ThreadPool

namespace winnow {

// w [rows, cols] -> bytes [PackedBytes(format, rows, cols)]. For every group the scale (and the
// minimum) is the one of a search whose squared error is least. `column_weight` [cols], not
// negative: how much a column's error counts, as the mean square of its input; empty: all the same.
void RoundPlain(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                std::span<const double> column_weight, std::byte* bytes, ThreadPool& pool);

// GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded in turn, those whose inputs are
// largest first as far as groups allow, and what rounding a column changes in the output is taken
// back as well as possible by the columns not yet rounded. `moments` [cols, cols]: sum or mean of
// x x^T over the inputs x of the matrix, symmetric. `damping` times the mean of its diagonal is
// added to the diagonal (0.01 is usual). Columns without input are rounded to the nearest.
void RoundCompensated(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                      std::span<const double> moments, double damping, std::byte* bytes,
                      ThreadPool& pool);

// What RoundCompensated makes of the moments, for callers that round several matrices with the same
// inputs or one in pieces. It holds cols^2 floats.
struct InputFactor {
  // order [cols]: columns in the order of rounding, whole groups. inverse [cols, cols], upper
  // triangular in that order: U of (moments + damping)^-1 = U^T U. Both empty if no input is there.
  std::vector<int64_t> order;
  std::vector<float> inverse;
};
InputFactor FactorInputs(std::span<const double> moments, int64_t cols, const PackedFormat& format,
                         double damping, ThreadPool& pool);
// `factor` made for the same group_columns.
void RoundCompensated(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                      const InputFactor& factor, std::byte* bytes, ThreadPool& pool);

// What rounding cost: sum over rows of d M d^T, d = w - what the bytes stand for. With the mean of
// x x^T as M [cols, cols] it is the mean of ||(W - Q) x||^2. `moments` may also be [cols], the
// diagonal alone, or empty: the identity.
double RoundingError(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                     std::span<const double> moments, const std::byte* bytes, ThreadPool& pool);

// The values the bytes stand for, [rows, cols].
void UnpackMatrix(const PackedFormat& format, int64_t rows, int64_t cols, const std::byte* bytes,
                  float* values, ThreadPool& pool);

}  // namespace winnow
