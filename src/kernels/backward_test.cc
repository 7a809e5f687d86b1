// Derivatives against their formulas in double, and products with W itself against plain sums.
#include "kernels/backward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/matmul.h"

namespace winnow {
namespace {

std::vector<float> Normal(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<double> Wide(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

// Sizes around tiles, blocks of 256 and parts of vectors; W stored in each format.
TEST(MatMulTransposed, EqualsPlainSums) {
  ThreadPool pool(2);
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16}) {
    for (const auto& [rows, k, n] :
         {std::tuple{1, 1, 1}, {7, 5, 33}, {13, 257, 31}, {40, 600, 70}, {3, 64, 17}}) {
      const std::vector<float> x = Normal(static_cast<size_t>(rows * k), 1);
      const std::vector<float> w = Normal(static_cast<size_t>(k * n), 2);
      std::vector<std::byte> stored(w.size() * DtypeBits(dtype) / 8);
      for (size_t i = 0; i < w.size(); ++i) StoreFloat(dtype, w[i], stored.data(), i);
      const WeightMatrix matrix{stored.data(), k, n, dtype};
      std::vector<float> xt(x.size());
      for (int i = 0; i < rows; ++i) {
        for (int r = 0; r < k; ++r) xt[static_cast<size_t>(r * rows + i)] = x[i * k + r];
      }
      std::vector<float> plain(static_cast<size_t>(rows * n)), turned(plain.size());
      PackedRows packed;
      packed.Pack(x.data(), rows, k, k, pool);
      MatMulTransposed(packed, matrix, plain.data(), n, pool);
      packed.PackTransposed(xt.data(), rows, k, rows, pool);
      MatMulTransposedSingle(packed, matrix, turned.data(), n);
      EXPECT_EQ(plain, turned);  // the same sums in the same order
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < n; ++j) {
          double sum = 0, size = 0;
          for (int r = 0; r < k; ++r) {
            const double term = static_cast<double>(x[i * k + r]) *
                                static_cast<double>(LoadAsFloat(dtype, stored.data(),
                                                                static_cast<size_t>(r * n + j)));
            sum += term;
            size += std::abs(term);
          }
          // f32 sums of k terms: far below k units in the last place of the sum of sizes.
          EXPECT_NEAR(plain[static_cast<size_t>(i * n + j)], sum, 1e-6 * size);
        }
      }
    }
  }
}

TEST(Backward, SwiGluMatchesDifferences) {
  const size_t n = 37;
  const std::vector<float> gate = Normal(n, 3), up = Normal(n, 4), d_inner = Normal(n, 5);
  std::vector<float> d_gate(n), d_up(n), inner(n);
  const float scale = 0.3f;
  const float product =
      SwiGluBackward(gate.data(), up.data(), d_inner.data(), scale, static_cast<int64_t>(n),
                     d_gate.data(), d_up.data(), inner.data());
  const std::vector<double> gates = Wide(gate), ups = Wide(up), grads = Wide(d_inner);
  const double factor = static_cast<double>(scale);
  double expected = 0;
  for (size_t i = 0; i < n; ++i) {
    const double g = gates[i], sigmoid = 1 / (1 + std::exp(-g)), silu = g * sigmoid;
    expected += grads[i] * silu * ups[i];
    // A few roundings of values around 1.
    EXPECT_NEAR(d_gate[i], factor * grads[i] * ups[i] * sigmoid * (1 + g * (1 - sigmoid)), 2e-6);
    EXPECT_NEAR(d_up[i], factor * grads[i] * silu, 2e-6);
    EXPECT_NEAR(inner[i], factor * silu * ups[i], 2e-6);
  }
  EXPECT_NEAR(product, expected, 1e-5);
}

TEST(Backward, RmsNormMatchesDifferences) {
  const int64_t n = 19;
  const std::vector<float> x = Normal(n, 6), w = Normal(n, 7), d_y = Normal(n, 8);
  const std::vector<double> ws = Wide(w), ds = Wide(d_y);
  const auto value = [&](int64_t changed, double step) {
    double squares = 0, sum = 0;
    std::vector<double> v(x.begin(), x.end());
    v[static_cast<size_t>(changed)] += step;
    for (const double e : v) squares += e * e;
    const double r = 1 / std::sqrt(squares / n + 1e-5);
    for (size_t i = 0; i < v.size(); ++i) sum += ds[i] * ws[i] * v[i] * r;
    return sum;
  };
  std::vector<float> d_x(n, 1.0f);
  std::vector<double> d_w(n, 0.0);
  RmsNormBackward(x.data(), w.data(), 1e-5f, d_y.data(), n, d_x.data(), d_w.data());
  for (int64_t i = 0; i < n; ++i) {
    // Central differences of step 1e-5 are good to 1e-9, the f32 result to a few 1e-7.
    EXPECT_NEAR(d_x[i] - 1, (value(i, 1e-5) - value(i, -1e-5)) / 2e-5, 2e-6);
  }
}

TEST(Backward, SoftmaxSumsToNothing) {
  const int64_t n = 21;
  std::vector<float> d = Normal(n, 10);
  std::vector<double> exact = Wide(Normal(n, 9));
  double total = 0, mean = 0;
  for (double& value : exact) total += value = std::exp(value);
  for (double& value : exact) value /= total;
  const std::vector<float> p(exact.begin(), exact.end());
  const std::vector<double> before = Wide(d);
  for (size_t i = 0; i < before.size(); ++i) mean += exact[i] * before[i];
  SoftmaxBackward(p.data(), 2, n, d.data());
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_NEAR(d[i], 2 * exact[i] * (before[i] - mean), 1e-6);
  }
}

// Two steps of torch.optim.AdamW(lr=0.1, weight_decay=0.01) on one weight, by hand in double.
TEST(Backward, AdamWFollowsItsFormula) {
  std::vector<float> w(5, 0.5f), m(5, 0.0f), v(5, 0.0f);
  double dw = 0.5, dm = 0, dv = 0;
  for (int t = 1; t <= 2; ++t) {
    const double g = 0.3 * t, lr = 0.1;
    dm = 0.9 * dm + 0.1 * g;
    dv = 0.999 * dv + 0.001 * g * g;
    dw = dw * (1 - lr * 0.01) - lr / (1 - std::pow(0.9, t)) * dm /
                                    (std::sqrt(dv) / std::sqrt(1 - std::pow(0.999, t)) + 1e-8);
    const std::vector<float> gradient(5, static_cast<float>(g));
    AdamWStep({.decay = static_cast<float>(1 - lr * 0.01),
               .step_size = static_cast<float>(lr / (1 - std::pow(0.9, t))),
               .root_bias2 = static_cast<float>(std::sqrt(1 - std::pow(0.999, t)))},
              gradient.data(), 5, w.data(), m.data(), v.data());
  }
  for (const float value : w) EXPECT_NEAR(value, dw, 1e-6);
}

}  // namespace
}  // namespace winnow
