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

inline constexpr size_t kMostLevels = 16;

// `nearest` rounds a vector.
template <class Nearest>
HWY_INLINE CodeSums SumOne(const float* x, const float* weight, size_t n,
                           const CodeCandidate& candidate, const Nearest& nearest) {
  const DF d;
  const VF inverse = hn::Set(d, candidate.inverse_scale), offset = hn::Set(d, candidate.offset);
  VF sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  VF squares = hn::Zero(d);
  for (size_t i = 0; i < n; i += kLanes) {
    const VF exact = hn::MulAdd(hn::LoadU(d, x + i), inverse, offset);
    const VF q = nearest(exact);
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
  const VF lowest = hn::Set(DF(), low), highest = hn::Set(DF(), high);
  for (const CodeCandidate& candidate : candidates) {
    *sums++ = SumOne(x, weight, static_cast<size_t>(n), candidate, [&](VF exact) HWY_ATTR {
      return hn::Min(hn::Max(hn::Round(exact), lowest), highest);
    });
  }
}

void SumLevelsTarget(const float* x, const float* weight, int64_t n, std::span<const float> levels,
                     std::span<const CodeCandidate> candidates, CodeSums* sums) {
  const DF d;
  float border[kMostLevels] = {}, step[kMostLevels] = {};
  const size_t borders = levels.size() - 1;
  for (size_t c = 0; c < borders; ++c) {
    border[c] = (levels[c] + levels[c + 1]) / 2;
    step[c] = levels[c + 1] - levels[c];
  }
  for (const CodeCandidate& candidate : candidates) {
    *sums++ = SumOne(x, weight, static_cast<size_t>(n), candidate, [&](VF exact) HWY_ATTR {
      VF q = hn::Set(d, levels.front());
      for (size_t c = 0; c < borders; ++c) {
        const auto above = hn::Gt(exact, hn::Set(d, border[c]));
        q = hn::Add(q, hn::IfThenElseZero(above, hn::Set(d, step[c])));
      }
      return q;
    });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(SumCodesTarget);
HWY_EXPORT(SumLevelsTarget);

void SumCodes(const float* x, const float* weight, int64_t n, float low, float high,
              std::span<const CodeCandidate> candidates, CodeSums* sums) {
  HWY_DYNAMIC_DISPATCH(SumCodesTarget)(x, weight, n, low, high, candidates, sums);
}

void SumLevels(const float* x, const float* weight, int64_t n, std::span<const float> levels,
               std::span<const CodeCandidate> candidates, CodeSums* sums) {
  HWY_DYNAMIC_DISPATCH(SumLevelsTarget)(x, weight, n, levels, candidates, sums);
}

namespace {

template <class Nearest>
CodeSums ReferenceSums(const float* x, const float* weight, int64_t n,
                       const CodeCandidate& candidate, const Nearest& nearest) {
  double rr = 0, r = 0, rq = 0, q = 0, qq = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float exact = std::fma(x[i], candidate.inverse_scale, candidate.offset);
    const auto code = static_cast<double>(nearest(exact));
    const double rest = static_cast<double>(exact) - code;
    const auto w = static_cast<double>(weight[i]);
    rr += w * rest * rest;
    r += w * rest;
    rq += w * rest * code;
    q += w * code;
    qq += w * code * code;
  }
  return {static_cast<float>(rr), static_cast<float>(r), static_cast<float>(rq),
          static_cast<float>(q), static_cast<float>(qq)};
}

}  // namespace

void SumCodesReference(const float* x, const float* weight, int64_t n, float low, float high,
                       std::span<const CodeCandidate> candidates, CodeSums* sums) {
  for (const CodeCandidate& candidate : candidates) {
    *sums++ = ReferenceSums(x, weight, n, candidate, [&](float exact) {
      return std::clamp(std::nearbyint(exact), low, high);
    });
  }
}

void SumLevelsReference(const float* x, const float* weight, int64_t n,
                        std::span<const float> levels, std::span<const CodeCandidate> candidates,
                        CodeSums* sums) {
  for (const CodeCandidate& candidate : candidates) {
    *sums++ = ReferenceSums(x, weight, n, candidate, [&](float exact) {
      return *std::min_element(levels.begin(), levels.end(), [&](float a, float b) {
        return std::fabs(exact - a) < std::fabs(exact - b);
      });
    });
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
