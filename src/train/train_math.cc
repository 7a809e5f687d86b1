#include "train/train_math.h"

#include "kernels/accumulate.h"
#include "kernels/backward.h"
#include "kernels/elementwise.h"

namespace winnow {

void GradientProducts::Input(const float* d_y, int64_t rows, const WeightMatrix& w, float* d_x) {
  packed_.Pack(d_y, rows, w.rows, w.rows, pool_);
  MatMulTransposed(packed_, w, d_x, w.cols, pool_);
}

void GradientProducts::Weight(const float* d_y, int64_t rows, int64_t n, const float* x, int64_t k,
                              float* d_w) {
  if (rows == 0) return;
  GrowBuffer(product_, n * k);
  packed_.PackTransposed(d_y, n, rows, n, pool_);
  MatMulTransposed(packed_, F32Matrix(x, rows, k), product_.data(), k, pool_);
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    AddInPlace(d_w + first * k, product_.data() + first * k, (end - first) * k);
  });
}

void GradientProducts::Bias(const float* d_y, int64_t rows, int64_t n, float* d_b) {
  std::vector<double> sums(static_cast<size_t>(n));
  AccumulateRows(sums.data(), d_y, rows, n, n);
  for (int64_t i = 0; i < n; ++i) d_b[i] += static_cast<float>(sums[static_cast<size_t>(i)]);
}

void GradientProducts::Norm(const float* x, int64_t rows, int64_t groups, int64_t n,
                            std::span<const float> weight, float eps, const float* d_y, float* d_x,
                            float* d_weight) {
  // Sums of fixed ranges of rows, added in their order, so that threads change nothing.
  constexpr int64_t kRows = 32;
  const int64_t ranges = (rows + kRows - 1) / kRows;
  std::vector<double> sums(d_weight == nullptr ? 0 : static_cast<size_t>(ranges * n));
  pool_.Run(ranges, [&](int64_t range, int) {
    const int64_t end = std::min(rows, (range + 1) * kRows) * groups;
    for (int64_t r = range * kRows * groups; r < end; ++r) {
      RmsNormBackward(x + r * n, weight.data(), eps, d_y + r * n, n, d_x + r * n,
                      sums.empty() ? nullptr : sums.data() + range * n);
    }
  });
  if (d_weight == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t range = 0; range < ranges; ++range) {
      total += sums[static_cast<size_t>(range * n + i)];
    }
    d_weight[i] += static_cast<float>(total);
  }
}

}  // namespace winnow
