#include "kernels/divergence.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/test_support.h"

namespace winnow {
namespace {

struct Streams {
  std::vector<float> intact, base, addition, norm;
};

Streams MakeStreams(int64_t rows, int64_t n, float difference) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Streams s;
  for (int64_t i = 0; i < rows * n; ++i) {
    s.intact.push_back(2 * normal(random));
    s.base.push_back(s.intact.back() + difference * normal(random));
    s.addition.push_back(difference * normal(random));
  }
  for (int64_t i = 0; i < n; ++i) s.norm.push_back(1 + 0.1f * normal(random));
  return s;
}

// Widths with and without a rest behind the last vector; small and large differences (series and
// logarithms); with and without the final norm.
class Divergence : public EveryIsa {};
WINNOW_EVERY_ISA(Divergence);

// Widths with and without a rest behind the last vector; small and large differences (series and
// logarithms); with and without the final norm.
TEST_P(Divergence, EqualsThePublishedFormulaInDouble) {
  for (const int64_t n : {5, 64, 131, 2048}) {
    for (const float difference : {0.001f, 0.05f, 1.0f, 6.0f}) {
      for (const bool norm : {false, true}) {
        const int64_t rows = 3;
        const Streams s = MakeStreams(rows, n, difference);
        std::vector<float> p = s.intact, scratch(static_cast<size_t>(n));
        Softmax(p.data(), rows, n, n);
        const CandidateStream candidate{.base = s.base.data(),
                                        .addition = s.addition.data(),
                                        .scale = 0.3f,
                                        .norm_weight = norm ? s.norm.data() : nullptr,
                                        .norm_eps = 1e-6f};
        std::vector<double> got(rows * 2), want(rows * 2);
        JensenShannon(p.data(), candidate, rows, n, scratch.data(), got.data(), 2);
        JensenShannonReference(p.data(), candidate, rows, n, want.data(), 2);
        for (int64_t t = 0; t < rows; ++t) {
          const auto at = static_cast<size_t>(2 * t);
          // Probabilities are f32, off by about 1e-7 of themselves at random: where p and q differ
          // by a share x of themselves, r is off by 1e-7 / x of itself.
          const double tolerance = 5e-6 + 4e-7 / static_cast<double>(difference);
          EXPECT_NEAR(got[at], want[at], tolerance * want[at] + 1e-12)
              << n << " " << difference << " " << norm;
        }
      }
    }
  }
}

TEST_P(Divergence, OfEqualStreamsIsNothingAndOfDisjointOnesLn2) {
  std::vector<float> p(32, 0.0f), scratch(32), far(32, -100.0f), same(32, 0.0f);
  p[3] = 1;
  far[7] = 100;
  same[3] = 200;
  double js = -1;
  JensenShannon(p.data(), {.base = far.data()}, 1, 32, scratch.data(), &js, 1);
  EXPECT_NEAR(js, std::log(2.0), 1e-6);
  JensenShannon(p.data(), {.base = same.data()}, 1, 32, scratch.data(), &js, 1);
  EXPECT_EQ(js, 0);
}

TEST_P(Divergence, NanStaysVisible) {
  std::vector<float> p(16, 1.0f / 16), scratch(16), broken(16, 0.0f);
  broken[2] = std::nanf("");
  double js = 0;
  JensenShannon(p.data(), {.base = broken.data()}, 1, 16, scratch.data(), &js, 1);
  EXPECT_TRUE(std::isnan(js));
}

}  // namespace
}  // namespace winnow
