// Double-precision references: short loops that are right by inspection.
#include <algorithm>
#include <cmath>

#include "base/dtype.h"           // LoadAsFloat
#include "kernels/elementwise.h"  // *Reference
#include "kernels/matmul.h"       // MatMulReference

namespace winnow {
namespace {

double Widened(float x) {
  return static_cast<double>(x);
}

}  // namespace

void MatMulReference(const float* x, int64_t rows, int64_t ld_x, const WeightMatrix& w, float* y,
                     int64_t ld_y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < w.rows; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < w.cols; ++k) {
        const auto index = static_cast<size_t>(j * w.stride() + k);
        sum += Widened(x[i * ld_x + k]) * Widened(LoadAsFloat(w.dtype, w.data, index));
      }
      y[i * ld_y + j] = static_cast<float>(sum);
    }
  }
}

void RmsNormReference(const float* x, int64_t rows, int64_t n, int64_t ld_x, const float* weight,
                      float eps, float* y, int64_t ld_y) {
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < n; ++j) squares += Widened(x[i * ld_x + j]) * Widened(x[i * ld_x + j]);
    const double root = std::sqrt(squares / static_cast<double>(n) + Widened(eps));
    for (int64_t j = 0; j < n; ++j) {
      y[i * ld_y + j] = static_cast<float>(Widened(weight[j]) * Widened(x[i * ld_x + j]) / root);
    }
  }
}

void SoftmaxReference(float* x, int64_t rows, int64_t n, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = x + i * ld;
    if (n == 0) continue;
    const double largest = Widened(*std::max_element(row, row + n));
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += std::exp(Widened(row[j]) - largest);
    for (int64_t j = 0; j < n; ++j) {
      row[j] = static_cast<float>(std::exp(Widened(row[j]) - largest) / sum);
    }
  }
}

void GramUpperReference(const float* f, int64_t m, int64_t n, int64_t ld, float* gram) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = i; j < m; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += Widened(f[i * ld + k]) * Widened(f[j * ld + k]);
      *gram++ = static_cast<float>(sum);
    }
  }
}

}  // namespace winnow
