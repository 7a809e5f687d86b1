#include "condense/feature_moments.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/accumulate.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"

namespace winnow {
namespace {

constexpr int64_t kPanel = 256;  // features multiplied with all others at once

// out [columns, rows] = in [rows, columns] transposed.
void Transpose(const float* in, int64_t rows, int64_t columns, float* out, ThreadPool& pool) {
  constexpr int64_t kTile = 32;
  pool.Run((columns + kTile - 1) / kTile, [&](int64_t task, int) {
    const int64_t first = task * kTile, end = std::min(columns, first + kTile);
    for (int64_t row = 0; row < rows; row += kTile) {
      const int64_t last = std::min(rows, row + kTile);
      for (int64_t c = first; c < end; ++c) {
        for (int64_t r = row; r < last; ++r) out[c * rows + r] = in[r * columns + c];
      }
    }
  });
}

WeightMatrix AsMatrix(const float* data, int64_t rows, int64_t cols) {
  return {reinterpret_cast<const std::byte*>(data), rows, cols, Dtype::kF32};
}

}  // namespace

FeatureMoments::FeatureMoments(int64_t num_features, int64_t hidden)
    : num_features_(num_features),
      hidden_(hidden),
      gram_(static_cast<size_t>(num_features * num_features)),
      cross_(static_cast<size_t>(num_features * hidden)),
      feature_sum_(static_cast<size_t>(num_features)),
      target_sum_(static_cast<size_t>(hidden)) {
  std::memset(gram_.data(), 0, gram_.size_bytes());
  std::memset(cross_.data(), 0, cross_.size_bytes());
}

uint64_t FeatureMoments::Bytes(int64_t num_features, int64_t hidden, int64_t tokens_a_call) {
  const auto m = static_cast<uint64_t>(num_features), h = static_cast<uint64_t>(hidden),
             n = static_cast<uint64_t>(tokens_a_call);
  return (m * m + m * h) * sizeof(double) +
         ((m + h) * n + kPanel * std::max(m, h)) * sizeof(float) +
         PackedRows::Bytes(kPanel, tokens_a_call);
}

void FeatureMoments::Add(float* features, float* target, const float* weight, int64_t n,
                         ThreadPool& pool) {
  const int64_t m = num_features_, h = hidden_;
  for (int64_t t = 0; t < n; ++t) {
    // First moments carry the whole weight, both factors of the second ones its root.
    const auto w = static_cast<double>(weight[t]);
    AccumulateDouble(feature_sum_.data(), w, features + t * m, m);
    AccumulateDouble(target_sum_.data(), w, target + t * h, h);
    weight_sum_ += w;
    double square = 0;
    for (int64_t i = 0; i < h; ++i) {
      square += static_cast<double>(target[t * h + i]) * static_cast<double>(target[t * h + i]);
    }
    target_square_ += w * square;
  }
  pool.Run(n, [&](int64_t t, int) {
    const float root = std::sqrt(weight[t]);
    for (int64_t i = 0; i < m; ++i) features[t * m + i] *= root;
    for (int64_t i = 0; i < h; ++i) target[t * h + i] *= root;
  });
  Grow(transposed_, m * n);
  Grow(target_transposed_, h * n);
  Grow(product_, kPanel * std::max(m, h));
  Transpose(features, n, m, transposed_.data(), pool);
  Transpose(target, n, h, target_transposed_.data(), pool);
  PackedRows packed;
  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t rows = std::min(kPanel, m - first);
    packed.Pack(transposed_.data() + first * n, rows, n, n, pool);
    const int64_t columns = m - first;  // the upper triangle
    MatMul(packed, AsMatrix(transposed_.data() + first * n, columns, n), product_.data(), columns,
           pool);
    pool.Run(rows, [&](int64_t i, int) {
      AccumulateDouble(gram_.data() + (first + i) * m + first, 1.0, product_.data() + i * columns,
                       columns);
    });
    MatMul(packed, AsMatrix(target_transposed_.data(), h, n), product_.data(), h, pool);
    pool.Run(rows, [&](int64_t i, int) {
      AccumulateDouble(cross_.data() + (first + i) * h, 1.0, product_.data() + i * h, h);
    });
  }
}

void FeatureMoments::Finish() {
  const auto m = static_cast<size_t>(num_features_);
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = i + 1; j < m; ++j) gram_[j * m + i] = gram_[i * m + j];
  }
}

}  // namespace winnow
