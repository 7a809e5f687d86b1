#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/targets.h"

namespace winnow {
namespace {

TEST(Smoke, Runs) {
  for (const auto& isa : SupportedIsas()) {
    SelectIsa(isa);
    EXPECT_EQ(ActiveIsa(), isa);
    ThreadPool pool(2);
    std::mt19937 rng(1);
    std::normal_distribution<float> g;
    for (int rows : {1, 5, 6, 7, 37, 100}) {
      const int n = 33, k = 300;
      std::vector<float> x(rows * k), y(rows * n), r(rows * n), w(n * k);
      for (float& v : x) v = g(rng);
      for (float& v : w) v = g(rng);
      for (Dtype dt : {Dtype::kF32, Dtype::kBF16, Dtype::kF16}) {
        std::vector<uint16_t> h(n * k);
        for (int i = 0; i < n * k; ++i) h[i] = dt == Dtype::kBF16 ? Bf16FromFloat(w[i]) : F16FromFloat(w[i]);
        WeightMatrix m{dt == Dtype::kF32 ? reinterpret_cast<const std::byte*>(w.data()) : reinterpret_cast<const std::byte*>(h.data()), n, k, dt};
        PackedRows p;
        p.Pack(x.data(), rows, k, k, pool);
        MatMulReference(x.data(), rows, k, m, r.data(), n);
        MatMul(p, m, y.data(), n, pool);
        for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], r[i], 1e-4) << isa << " " << i;
        MatVec(x.data(), rows, m, y.data(), n, pool);
        for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], r[i], 1e-4) << isa << " " << i;
      }
    }
  }
}

}  // namespace
}  // namespace winnow
