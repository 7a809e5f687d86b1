#include "kernels/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/divergence.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/silu-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// f(i, count): whole vectors, then the rest.
template <class Body>
HWY_INLINE void ForParts(size_t n, const Body& body) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if constexpr (kLanes > 1) {
    if (i < n) body(i, n - i);
  }
}
HWY_INLINE VF LoadPart(const float* p, size_t count) {
  return kLanes == 1 || count == kLanes ? hn::LoadU(DF(), p) : LoadPartial(p, count);
}
HWY_INLINE void StorePart(VF v, float* p, size_t count) {
  if (kLanes == 1 || count == kLanes) {
    hn::StoreU(v, DF(), p);
  } else {
    StorePartial(v, p, count);
  }
}

// ln(x) for normal x > 0, within 2 units in the last place: the exponent's share plus the
// polynomial of Cephes' logf on the mantissa, taken from sqrt(1/2) to sqrt(2).
HWY_INLINE VF LogPositive(VF x) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const auto bits = hn::BitCast(di, x);
  auto exponent = hn::Sub(hn::ShiftRight<23>(bits), hn::Set(di, 126));
  const auto mantissa_bits =
      hn::Or(hn::And(bits, hn::Set(di, 0x007fffff)), hn::Set(di, 0x3f000000));
  VF m = hn::BitCast(d, mantissa_bits);  // [1/2, 1)
  const auto small = hn::Lt(m, hn::Set(d, 0.707106781f));
  VF e = hn::ConvertTo(d, exponent);
  e = hn::IfThenElse(small, hn::Sub(e, hn::Set(d, 1.0f)), e);
  m = hn::Sub(hn::IfThenElse(small, hn::Add(m, m), m), hn::Set(d, 1.0f));
  const VF z = hn::Mul(m, m);
  VF p = hn::Set(d, 7.0376836292e-2f);
  p = hn::MulAdd(p, m, hn::Set(d, -1.1514610310e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 1.1676998740e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, -1.2420140846e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 1.4249322787e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, -1.6668057665e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 2.0000714765e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, -2.4999993993e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 3.3333331174e-1f));
  VF y = hn::Mul(hn::Mul(p, m), z);
  y = hn::MulAdd(e, hn::Set(d, -2.12194440e-4f), y);
  y = hn::NegMulAdd(hn::Set(d, 0.5f), z, y);
  return hn::MulAdd(e, hn::Set(d, 0.693359375f), hn::Add(m, y));
}

// (1-r) ln(1-r) + (1+r) ln(1+r) for |r| <= 1: its series r^2 + r^4/6 + r^6/15 + ... where that is
// exact to f32 (|r| <= 1/2), logarithms elsewhere.
HWY_INLINE VF MeanExcess(VF r) {
  const DF d;
  const VF u = hn::Mul(r, r);
  VF series = hn::Set(d, 1.0f / 190);
  for (const float divisor : {153.0f, 120.0f, 91.0f, 66.0f, 45.0f, 28.0f, 15.0f, 6.0f, 1.0f}) {
    series = hn::MulAdd(series, u, hn::Set(d, 1.0f / divisor));
  }
  series = hn::Mul(series, u);
  const auto near = hn::Not(hn::Gt(u, hn::Set(d, 0.25f)));  // and NaN, which the series keeps
  if (HWY_LIKELY(hn::AllTrue(d, near))) return series;
  const VF one = hn::Set(d, 1.0f), least = hn::Set(d, 1e-30f);
  const VF low = hn::Max(hn::Sub(one, r), least), high = hn::Max(hn::Add(one, r), least);
  const VF logarithms = hn::MulAdd(low, LogPositive(low), hn::Mul(high, LogPositive(high)));
  return hn::IfThenElse(near, series, logarithms);
}

double RowDivergence(const float* p, const CandidateStream& c, size_t row, size_t n, float* x) {
  const DF d;
  const float* base = c.base + row * n;
  const float* addition = c.addition == nullptr ? nullptr : c.addition + row * n;
  const VF scale = hn::Set(d, c.scale);
  const VF lowest = hn::Set(d, -std::numeric_limits<float>::max());
  VF largest = lowest, squares = hn::Zero(d);
  ForParts(n, [&](size_t i, size_t count) {
    VF v = LoadPart(base + i, count);
    if (addition != nullptr) v = hn::MulAdd(scale, LoadPart(addition + i, count), v);
    StorePart(v, x + i, count);
    if (c.norm_weight != nullptr) {
      squares = hn::MulAdd(v, v, squares);
    } else if (count == kLanes) {
      largest = hn::Max(largest, v);
    } else {
      for (size_t l = i; l < n; ++l) largest = hn::Max(largest, hn::Set(d, x[l]));
    }
  });
  if (c.norm_weight != nullptr) {
    const float mean = SumLanes(squares) / static_cast<float>(n);
    const VF norm = hn::Set(d, 1.0f / std::sqrt(mean + c.norm_eps));
    ForParts(n, [&](size_t i, size_t count) {
      const VF v =
          hn::Mul(LoadPart(c.norm_weight + i, count), hn::Mul(LoadPart(x + i, count), norm));
      StorePart(v, x + i, count);
      if (count == kLanes) {
        largest = hn::Max(largest, v);
      } else {
        for (size_t l = i; l < n; ++l) largest = hn::Max(largest, hn::Set(d, x[l]));
      }
    });
  }
  const VF shift = hn::MaxOfLanes(d, largest);
  VF sums = hn::Zero(d);
  float rest = 0;
  ForParts(n, [&](size_t i, size_t count) {
    const VF e = ExpNonPositive(hn::Sub(LoadPart(x + i, count), shift));
    StorePart(e, x + i, count);
    if (count == kLanes) {
      sums = hn::Add(sums, e);
    } else {
      for (size_t l = i; l < n; ++l) rest += x[l];
    }
  });
  const VF normalize = hn::Set(d, 1.0f / (SumLanes(sums) + rest));
  const VF half = hn::Set(d, 0.5f), eps = hn::Set(d, kDivergenceEpsilon);
  VF total = hn::Zero(d);
  ForParts(n, [&](size_t i, size_t count) {
    const VF q = hn::Mul(LoadPart(x + i, count), normalize);
    const VF intact = LoadPart(p + i, count);
    const VF mean = hn::MulAdd(half, hn::Add(intact, q), eps);
    const VF r = hn::Div(hn::Mul(half, hn::Sub(q, intact)), mean);
    total = hn::MulAdd(mean, MeanExcess(r), total);
  });
  return 0.5 * static_cast<double>(SumLanes(total));
}

void JensenShannonTarget(const float* probabilities, const CandidateStream& candidate, int64_t rows,
                         int64_t n, float* scratch, double* out, int64_t stride) {
  const auto size = static_cast<size_t>(n);
  for (size_t t = 0; t < static_cast<size_t>(rows); ++t) {
    out[t * static_cast<size_t>(stride)] =
        RowDivergence(probabilities + t * size, candidate, t, size, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(JensenShannonTarget);

void JensenShannon(const float* probabilities, const CandidateStream& candidate, int64_t rows,
                   int64_t n, float* scratch, double* out, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(JensenShannonTarget)
  (probabilities, candidate, rows, n, scratch, out, stride);
}

void JensenShannonReference(const float* probabilities, const CandidateStream& candidate,
                            int64_t rows, int64_t n, double* out, int64_t stride) {
  const auto eps = static_cast<double>(kDivergenceEpsilon);
  std::vector<double> x(static_cast<size_t>(n));
  for (int64_t t = 0; t < rows; ++t) {
    double squares = 0, largest = -1e300, sum = 0, total = 0;
    for (int64_t i = 0; i < n; ++i) {
      auto v = static_cast<double>(candidate.base[t * n + i]);
      if (candidate.addition != nullptr) {
        v += static_cast<double>(candidate.scale) *
             static_cast<double>(candidate.addition[t * n + i]);
      }
      squares += v * v;
      x[static_cast<size_t>(i)] = v;
    }
    if (candidate.norm_weight != nullptr) {
      const double norm =
          1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(candidate.norm_eps));
      for (int64_t i = 0; i < n; ++i) {
        x[static_cast<size_t>(i)] *= norm * static_cast<double>(candidate.norm_weight[i]);
      }
    }
    for (const double v : x) largest = std::max(largest, v);
    for (double& v : x) sum += v = std::exp(v - largest);
    for (int64_t i = 0; i < n; ++i) {
      const auto p = static_cast<double>(probabilities[t * n + i]);
      const double q = x[static_cast<size_t>(i)] / sum;
      const double m = std::log((p + q) / 2 + eps);
      total += (p + eps) * (std::log(p + eps) - m) + (q + eps) * (std::log(q + eps) - m);
    }
    out[t * stride] = total / 2;
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
