#include "kernels/code_sums.h"

#include <cmath>

#include "kernels/test_support.h"

namespace winnow {
namespace {

class CodeSumsTest : public EveryIsa {};
WINNOW_EVERY_ISA(CodeSumsTest);

TEST_P(CodeSumsTest, MatchesItsReference) {
  for (const int64_t n : {16, 32, 64, 128}) {
    const std::vector<float> x = Normals(n, static_cast<uint32_t>(n));
    std::vector<float> weight = Normals(n, 7);
    for (float& w : weight) w = std::abs(w);
    const std::vector<CodeCandidate> candidates = {{3.0f, 0}, {-2.5f, 0}, {4.0f, 7.5f}};
    std::vector<CodeSums> sums(3), expected(3);
    const std::vector<float> levels = {-9, -4, -1, 0, 2, 5};
    for (const bool table : {false, true}) {
      if (table) {
        SumLevels(x.data(), weight.data(), n, levels, candidates, sums.data());
        SumLevelsReference(x.data(), weight.data(), n, levels, candidates, expected.data());
      } else {
        SumCodes(x.data(), weight.data(), n, -8, 7, candidates, sums.data());
        SumCodesReference(x.data(), weight.data(), n, -8, 7, candidates, expected.data());
      }
      for (size_t c = 0; c < 3; ++c) {
        // f32 sums of up to 128 terms, none larger than qq.
        const float tolerance = 1e-5f * (1 + expected[c].qq);
        EXPECT_NEAR(sums[c].rr, expected[c].rr, tolerance);
        EXPECT_NEAR(sums[c].r, expected[c].r, tolerance);
        EXPECT_NEAR(sums[c].rq, expected[c].rq, tolerance);
        EXPECT_NEAR(sums[c].q, expected[c].q, tolerance);
        EXPECT_NEAR(sums[c].qq, expected[c].qq, tolerance);
      }
    }
  }
}

}  // namespace
}  // namespace winnow
