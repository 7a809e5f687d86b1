#include "kernels/inverse.h"

#include <cmath>

#include "kernels/test_support.h"

namespace winnow {
namespace {

class InverseTest : public EveryIsa {};
WINNOW_EVERY_ISA(InverseTest);

// x^T x + 0.1 n I of normals: positive definite, condition number below 100.
std::vector<double> PositiveDefinite(int64_t n, uint32_t seed) {
  const std::vector<float> x = Normals(n * n, seed);
  std::vector<double> a(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = i == j ? 0.1 * static_cast<double>(n) : 0.0;
      for (int64_t k = 0; k < n; ++k) {
        sum += static_cast<double>(x[k * n + i]) * static_cast<double>(x[k * n + j]);
      }
      a[static_cast<size_t>(i * n + j)] = sum;
    }
  }
  return a;
}

TEST_P(InverseTest, MatchesItsReferenceForAnyThreads) {
  for (const int64_t n : {1, 2, 5, 24, 63, 64, 65, 128, 150, 200, 331}) {
    const std::vector<double> a = PositiveDefinite(n, static_cast<uint32_t>(n));
    std::vector<double> expected = a, first;
    ASSERT_TRUE(InvertPositiveDefiniteReference(expected.data(), n));
    for (const int threads : {1, 3}) {
      ThreadPool pool(threads);
      std::vector<double> found = a;
      // What is above the diagonal must not be read.
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = i + 1; j < n; ++j) found[static_cast<size_t>(i * n + j)] = NAN;
      }
      ASSERT_TRUE(InvertPositiveDefinite(found.data(), n, pool)) << n;
      for (size_t i = 0; i < found.size(); ++i) {
        // Entries are at most 10 / n; both are off by some n units times the condition number.
        ASSERT_NEAR(found[i], expected[i], 1e-12) << n << " " << i;
      }
      if (threads == 1) first = found;
      EXPECT_EQ(std::memcmp(found.data(), first.data(), found.size() * sizeof(double)), 0) << n;
    }
  }
}

TEST_P(InverseTest, TheInverseFactorIsTriangularAndMakesTheInverse) {
  for (const int64_t n : {1, 5, 64, 150}) {
    const std::vector<double> a = PositiveDefinite(n, static_cast<uint32_t>(n));
    std::vector<double> expected = a, factor = a;
    ASSERT_TRUE(InvertPositiveDefiniteReference(expected.data(), n));
    ThreadPool pool(2);
    ASSERT_TRUE(InverseCholeskyFactor(factor.data(), n, pool));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;  // (L^-T L^-1)_ij
        for (int64_t k = 0; k < n; ++k) {
          sum += factor[static_cast<size_t>(k * n + i)] * factor[static_cast<size_t>(k * n + j)];
        }
        ASSERT_NEAR(sum, expected[static_cast<size_t>(i * n + j)], 1e-12) << n;
        if (j > i) {
          ASSERT_EQ(factor[static_cast<size_t>(i * n + j)], 0) << n;
        }
      }
    }
  }
}

TEST_P(InverseTest, RefusesWhatIsNotPositiveDefinite) {
  ThreadPool pool(1);
  for (const double last : {-1.0, 0.0, static_cast<double>(NAN)}) {
    std::vector<double> a(100 * 100, 0.0);
    for (size_t i = 0; i < 100; ++i) a[i * 101] = 1;
    a.back() = last;
    EXPECT_FALSE(InvertPositiveDefinite(a.data(), 100, pool)) << last;
  }
}

}  // namespace
}  // namespace winnow
