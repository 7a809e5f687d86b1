#include "kernels/code_sums.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/code_sums.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

inline constexpr size_t kMostLevels = 16;

CodeSums SumOne(const float* x, const float* weight, size_t n, float low, float high,
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
    *sums++ = SumOne(x, weight, static_cast<size_t>(n), low, high, candidate);
  }
}

// table[at], at below 16.
#if HWY_TARGET == HWY_SCALAR
HWY_INLINE VF LookUp(const float* table, hn::Vec<hn::RebindToSigned<DF>> at) {
  return hn::Set(DF(), table[hn::GetLane(at)]);
}
#else
HWY_INLINE VF LookUp(const float* table, hn::Vec<hn::RebindToSigned<DF>> at) {
  const DF d;
  if constexpr (kLanes >= kMostLevels) {
    return hn::TableLookupLanes(hn::Load(d, table), hn::IndicesFromVec(d, at));
  } else {
    const hn::RebindToSigned<DF> di;
    const auto low = hn::IndicesFromVec(d, hn::And(at, hn::Set(di, kLanes - 1)));
    const auto first = hn::TableLookupLanes(hn::Load(d, table), low);
    const auto second = hn::TableLookupLanes(hn::Load(d, table + kLanes), low);
    const auto upper = hn::Gt(at, hn::Set(di, kLanes - 1));
    return hn::IfThenElse(hn::RebindMask(d, upper), second, first);
  }
}
#endif

// Four candidates at a time; `nearest` rounds a vector.
template <class Nearest>
HWY_INLINE void SumErrorsOf(const float* x, const float* weight, size_t n,
                            std::span<const CodeCandidate> candidates, float* errors,
                            const Nearest& nearest) {
  const DF d;
  for (size_t first = 0; first < candidates.size(); first += 4) {
    VF sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    const size_t count = std::min<size_t>(4, candidates.size() - first);
    for (size_t c = 0; c < count; ++c) {
      const CodeCandidate& candidate = candidates[first + c];
      const VF inverse = hn::Set(d, candidate.inverse_scale);
      const VF offset = hn::Set(d, candidate.offset);
      for (size_t i = 0; i < n; i += kLanes) {
        const VF exact = hn::MulAdd(hn::LoadU(d, x + i), inverse, offset);
        const VF r = hn::Sub(exact, nearest(exact));
        sum[c] = hn::MulAdd(hn::Mul(hn::LoadU(d, weight + i), r), r, sum[c]);
      }
    }
    float lanes[4];
    SumLanesOfFour(sum, lanes);
    std::copy(lanes, lanes + count, errors + first);
  }
}

void SumErrorsTarget(const float* x, const float* weight, int64_t n, const CodeGrid& grid,
                     std::span<const CodeCandidate> candidates, float* errors) {
  const auto size = static_cast<size_t>(n);
  if (grid.levels.empty()) {
    const VF lowest = hn::Set(DF(), grid.low), highest = hn::Set(DF(), grid.high);
    SumErrorsOf(x, weight, size, candidates, errors, [&](VF exact) HWY_ATTR {
      return hn::Min(hn::Max(hn::Round(exact), lowest), highest);
    });
    return;
  }
  const hn::RebindToSigned<DF> di;
  // border[c]: between level c - 1 and c.
  HWY_ALIGN float level[kMostLevels] = {}, border[kMostLevels];
  std::fill(border, border + kMostLevels, std::numeric_limits<float>::infinity());
  for (size_t c = 0; c < grid.levels.size(); ++c) {
    level[c] = grid.levels[c];
    if (c > 0) border[c] = (grid.levels[c - 1] + grid.levels[c]) / 2;
  }
  const auto first_half = static_cast<int32_t>(std::bit_ceil(grid.levels.size()) / 2);
  SumErrorsOf(x, weight, size, candidates, errors, [&](VF exact) HWY_ATTR {
    auto at = hn::Zero(di);  // a level that is not above; found by halving
    for (int32_t half = first_half; half > 0; half /= 2) {
      const auto next = hn::Add(at, hn::Set(di, half));
      const auto above = hn::Gt(exact, LookUp(border, next));
      at = hn::IfThenElse(hn::RebindMask(di, above), next, at);
    }
    return LookUp(level, at);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(SumCodesTarget);
HWY_EXPORT(SumErrorsTarget);

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

void SumErrors(const float* x, const float* weight, int64_t n, const CodeGrid& grid,
               std::span<const CodeCandidate> candidates, float* errors) {
  HWY_DYNAMIC_DISPATCH(SumErrorsTarget)(x, weight, n, grid, candidates, errors);
}

void SumErrorsReference(const float* x, const float* weight, int64_t n, const CodeGrid& grid,
                        std::span<const CodeCandidate> candidates, float* errors) {
  for (const CodeCandidate& candidate : candidates) {
    double error = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float exact = std::fma(x[i], candidate.inverse_scale, candidate.offset);
      float rest = std::fabs(exact - std::clamp(std::nearbyint(exact), grid.low, grid.high));
      if (!grid.levels.empty()) rest = std::numeric_limits<float>::infinity();
      for (const float level : grid.levels) rest = std::min(rest, std::fabs(exact - level));
      error +=
          static_cast<double>(weight[i]) * static_cast<double>(rest) * static_cast<double>(rest);
    }
    *errors++ = static_cast<float>(error);
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
