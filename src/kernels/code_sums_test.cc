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
    SumCodes(x.data(), weight.data(), n, -8, 7, candidates, sums.data());
    SumCodesReference(x.data(), weight.data(), n, -8, 7, candidates, expected.data());
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

TEST_P(CodeSumsTest, ErrorsMatchTheirReference) {
  const std::vector<std::vector<float>> grids = {
      {}, {-3, 1}, {-9, -4, -1, 0, 2, 5}, {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8}};
  const std::vector<CodeCandidate> candidates = {
      {3.0f, 0}, {-2.5f, 0}, {4.0f, 1.5f}, {1.5f, -0.3f}, {6.0f, 0.1f}};
  for (const int64_t n : {16, 32, 128}) {
    const std::vector<float> x = Normals(n, static_cast<uint32_t>(n));
    std::vector<float> weight = Normals(n, 7);
    for (float& w : weight) w = std::abs(w);
    for (const std::vector<float>& levels : grids) {
      const CodeGrid grid = {.low = -8, .high = 7, .levels = levels};
      std::vector<float> errors(5), expected(5);
      SumErrors(x.data(), weight.data(), n, grid, candidates, errors.data());
      SumErrorsReference(x.data(), weight.data(), n, grid, candidates, expected.data());
      for (size_t c = 0; c < 5; ++c) {
        // f32 sums of up to 128 terms that are not negative.
        EXPECT_NEAR(errors[c], expected[c], 1e-5f * expected[c]) << n << " " << levels.size();
      }
    }
  }
}

}  // namespace
}  // namespace winnow
