#include "quantize/rounding.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/checked_math.h"  // CeilDiv
#include "base/error.h"
#include "kernels/matmul.h"
#include "quantize/group_fit.h"

namespace winnow {
namespace {

void CheckFinite(const float* row, int64_t index, int64_t cols) {
  for (int64_t col = 0; col < cols; ++col) {
    if (std::isfinite(row[col])) continue;
    throw ModelError(
        fmt::format("the weight at row {}, column {} is not a finite number", index, col),
        "winnow doctor lists the tensors that have such weights");
  }
}

}  // namespace

void RoundPlain(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                std::span<const double> column_weight, std::byte* bytes, ThreadPool& pool) {
  std::memset(bytes, 0, PackedBytes(format, rows, cols));
  std::vector<float> weight(static_cast<size_t>(cols), 1);
  for (size_t i = 0; i < column_weight.size(); ++i)
    weight[i] = static_cast<float>(column_weight[i]);
  const int64_t groups = CeilDiv(cols, format.group_columns);
  pool.Run(CeilDiv(rows, kPackedRows), [&](int64_t block, int) {
    GroupFitter fitter(format);
    std::vector<uint8_t> codes(static_cast<size_t>(cols));
    std::vector<uint16_t> scales(static_cast<size_t>(groups)), minima = scales;
    for (int64_t row = block * kPackedRows; row < std::min(rows, (block + 1) * kPackedRows);
         ++row) {
      const float* values = w + row * cols;
      CheckFinite(values, row, cols);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * format.group_columns;
        const int64_t count = std::min(format.group_columns, cols - first);
        const GroupScale scale = fitter.Fit(values + first, weight.data() + first, count);
        scales[static_cast<size_t>(group)] = scale.scale_bits;
        minima[static_cast<size_t>(group)] = scale.minimum_bits;
        for (int64_t col = first; col < first + count; ++col) {
          codes[static_cast<size_t>(col)] = fitter.Code(scale, values[col]);
        }
      }
      StorePackedRow(format, cols, row, {codes.data(), scales.data(), minima.data()}, bytes);
    }
  });
}

void UnpackMatrix(const PackedFormat& format, int64_t rows, int64_t cols, const std::byte* bytes,
                  float* values, ThreadPool& pool) {
  pool.Run(CeilDiv(rows, kPackedRows), [&](int64_t block, int) {
    for (int64_t row = block * kPackedRows; row < std::min(rows, (block + 1) * kPackedRows);
         ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        values[row * cols + col] = LoadPackedValue(format, cols, row, col, bytes);
      }
    }
  });
}

double RoundingError(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                     std::span<const double> moments, const std::byte* bytes, ThreadPool& pool) {
  std::vector<float> difference(static_cast<size_t>(rows * cols));
  UnpackMatrix(format, rows, cols, bytes, difference.data(), pool);
  for (size_t i = 0; i < difference.size(); ++i) difference[i] = w[i] - difference[i];
  const bool full = moments.size() == static_cast<size_t>(cols * cols) && cols > 1;
  std::vector<float> product;
  if (full) {
    std::vector<float> matrix(moments.begin(), moments.end());
    product.resize(difference.size());
    PackedRows packed;
    packed.Pack(difference.data(), rows, cols, cols, pool);
    MatMul(packed, WeightMatrix{std::as_bytes(std::span(matrix)).data(), cols, cols, Dtype::kF32},
           product.data(), cols, pool);
  }
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const auto at = static_cast<size_t>(row * cols + col);
      const auto d = static_cast<double>(difference[at]);
      sum += full              ? d * static_cast<double>(product[at])
             : moments.empty() ? d * d
                               : d * d * moments[static_cast<size_t>(col)];
    }
  }
  return sum;
}

}  // namespace winnow
