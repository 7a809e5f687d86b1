#include "kernels/code_sums.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/code_sums.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

CodeSums SumCodesOne(const float* x, const float* weight, size_t n, float low, float high,
                     const CodeCandidate& candidate) {
  const DF d;
  const VF inverse = hn::Set(d, candidate.inverse_scale), offset = hn::Set(d, candidate.offset);
  const VF lowest = hn::Set(d, low), highest = hn::Set(d, high);
  VF sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  VF squares = hn::Zero(d);
  for (size_t i = 0; i < n; i += kLanes) {
    const VF exact = hn::MulAdd(hn::LoadU(d, x + i), inverse, offset);
    const VF q = hn::Min(hn::Max(hn::Round(exact), lowest), highest);
    const VF r = hn::Sub(exact, q);
    const VF w = hn::LoadU(d, weight + i);
    const VF wr = hn::Mul(w, r), wq = hn::Mul(w, q);
    sum[0] = hn::MulAdd(wr, r, sum[0]);
    sum[1] = hn::Add(sum[1], wr);
    sum[2] = hn::MulAdd(wr, q, sum[2]);
    sum[3] = hn::Add(sum[3], wq);
    squares = hn::MulAdd(wq, q, squares);
  }
  float lanes[4];
  SumLanesOfFour(sum, lanes);
  return {lanes[0], lanes[1], lanes[2], lanes[3], SumLanes(squares)};
}

void SumCodesTarget(const float* x, const float* weight, int64_t n, float low, float high,
                    std::span<const CodeCandidate> candidates, CodeSums* sums) {
  for (const CodeCandidate& candidate : candidates) {
    *sums++ = SumCodesOne(x, weight, static_cast<size_t>(n), low, high, candidate);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(SumCodesTarget);

void SumCodes(const float* x, const float* weight, int64_t n, float low, float high,
              std::span<const CodeCandidate> candidates, CodeSums* sums) {
  HWY_DYNAMIC_DISPATCH(SumCodesTarget)(x, weight, n, low, high, candidates, sums);
}

void SumCodesReference(const float* x, const float* weight, int64_t n, float low, float high,
                       std::span<const CodeCandidate> candidates, CodeSums* sums) {
  for (const CodeCandidate& candidate : candidates) {
    double rr = 0, r = 0, rq = 0, q = 0, qq = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float exact = std::fma(x[i], candidate.inverse_scale, candidate.offset);
      const auto code = static_cast<double>(std::clamp(std::nearbyint(exact), low, high));
      const double rest = static_cast<double>(exact) - code;
      const auto w = static_cast<double>(weight[i]);
      rr += w * rest * rest;
      r += w * rest;
      rq += w * rest * code;
      q += w * code;
      qq += w * code * code;
    }
    *sums++ = {static_cast<float>(rr), static_cast<float>(r), static_cast<float>(rq),
               static_cast<float>(q), static_cast<float>(qq)};
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
