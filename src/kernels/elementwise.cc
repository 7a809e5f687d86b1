// Row-wise operations: norms, softmax, rotations, sums.
#include "kernels/elementwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/elementwise.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/silu-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// Vectors summed side by side, so that a sum is not bound by the latency of one chain of FMAs.
inline constexpr size_t kChains = 4;

// f(i, count) for whole vectors (count == kLanes) and then the rest of [0, n).
template <class Body, class Rest>
HWY_INLINE void ForVectors(int64_t n, const Body& body, const Rest& rest) {
  const auto size = static_cast<size_t>(n);
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i);
  if (i < size) rest(i, size - i);
}

float DotTarget(const float* a, const float* b, int64_t n) {
  const DF d;
  const auto size = static_cast<size_t>(n);
  VF sums[kChains] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  size_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
    HWY_UNROLL(4)
    for (size_t c = 0; c < kChains; ++c) {
      const size_t at = i + c * kLanes;
      sums[c] = hn::MulAdd(hn::LoadU(d, a + at), hn::LoadU(d, b + at), sums[c]);
    }
  }
  for (; i + kLanes <= size; i += kLanes) {
    sums[0] = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sums[0]);
  }
  if (i < size) {
    sums[1] = hn::MulAdd(LoadPartial(a + i, size - i), LoadPartial(b + i, size - i), sums[1]);
  }
  return SumLanes(hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3])));
}

float LargestMagnitudeTarget(const float* x, int64_t n) {
  const DF d;
  VF largest = hn::Zero(d);
  ForVectors(
      n, [&](size_t i) { largest = hn::Max(largest, hn::Abs(hn::LoadU(d, x + i))); },
      [&](size_t i, size_t count) {
        largest = hn::Max(largest, hn::Abs(LoadPartial(x + i, count)));
      });
  return hn::GetLane(hn::MaxOfLanes(d, largest));
}

void RmsNormTarget(const float* x, int64_t rows, int64_t n, int64_t ld_x, const float* weight,
                   float eps, float* y, int64_t ld_y) {
  const DF d;
  for (int64_t row = 0; row < rows; ++row, x += ld_x, y += ld_y) {
    const float mean = DotTarget(x, x, n) / static_cast<float>(n);
    const VF scale = hn::Set(d, 1.0f / std::sqrt(mean + eps));
    ForVectors(
        n,
        [&](size_t i) {
          const VF normed = hn::Mul(hn::LoadU(d, x + i), scale);
          hn::StoreU(hn::Mul(hn::LoadU(d, weight + i), normed), d, y + i);
        },
        [&](size_t i, size_t count) {
          const VF normed = hn::Mul(LoadPartial(x + i, count), scale);
          StorePartial(hn::Mul(LoadPartial(weight + i, count), normed), y + i, count);
        });
  }
}

void AddScaledTarget(float* x, float scale, const float* y, int64_t n) {
  const DF d;
  const VF s = hn::Set(d, scale);
  ForVectors(
      n,
      [&](size_t i) {
        hn::StoreU(hn::MulAdd(s, hn::LoadU(d, y + i), hn::LoadU(d, x + i)), d, x + i);
      },
      [&](size_t i, size_t count) {
        StorePartial(hn::MulAdd(s, LoadPartial(y + i, count), LoadPartial(x + i, count)), x + i,
                     count);
      });
}

// Largest of n >= 1 values; NaNs may be skipped (the sums that follow keep them).
HWY_INLINE float Largest(const float* x, int64_t n) {
  const DF d;
  VF largest = hn::Set(d, x[0]);
  ForVectors(
      n, [&](size_t i) { largest = hn::Max(largest, hn::LoadU(d, x + i)); },
      [&](size_t i, size_t count) {
        HWY_ALIGN float padded[kLanes];
        std::fill_n(padded, kLanes, x[i]);
        std::copy_n(x + i, count, padded);
        largest = hn::Max(largest, hn::Load(d, padded));
      });
  return hn::GetLane(hn::MaxOfLanes(d, largest));
}

void SoftmaxTarget(float* x, int64_t rows, int64_t n, int64_t ld) {
  const DF d;
  if (n <= 0) return;
  for (int64_t row = 0; row < rows; ++row, x += ld) {
    const VF largest = hn::Set(d, Largest(x, n));
    VF sums = hn::Zero(d);
    float rest_sum = 0;
    ForVectors(
        n,
        [&](size_t i) {
          const VF e = ExpNonPositive(hn::Sub(hn::LoadU(d, x + i), largest));
          sums = hn::Add(sums, e);
          hn::StoreU(e, d, x + i);
        },
        [&](size_t i, size_t count) {
          StorePartial(ExpNonPositive(hn::Sub(LoadPartial(x + i, count), largest)), x + i, count);
          for (size_t c = 0; c < count; ++c) rest_sum += x[i + c];
        });
    const VF scale = hn::Set(d, 1.0f / (SumLanes(sums) + rest_sum));
    ForVectors(
        n, [&](size_t i) { hn::StoreU(hn::Mul(hn::LoadU(d, x + i), scale), d, x + i); },
        [&](size_t i, size_t count) {
          StorePartial(hn::Mul(LoadPartial(x + i, count), scale), x + i, count);
        });
  }
}

double LogSumExpTarget(const float* x, int64_t n) {
  const DF d;
  const DD dd;
  const hn::Rebind<float, DD> d_half;
  if (n <= 0) return -std::numeric_limits<double>::infinity();
  const float largest = Largest(x, n);
  auto sums = hn::Zero(dd);
  double rest_sum = 0;
  HWY_ALIGN float e[kLanes];
  const VF shift = hn::Set(d, largest);
  ForVectors(
      n,
      [&](size_t i) {
        hn::Store(ExpNonPositive(hn::Sub(hn::LoadU(d, x + i), shift)), d, e);
        for (size_t l = 0; l < kLanes; l += kDoubleLanes) {
          sums = hn::Add(sums, hn::PromoteTo(dd, hn::Load(d_half, e + l)));
        }
      },
      [&](size_t i, size_t count) {
        StorePartial(ExpNonPositive(hn::Sub(LoadPartial(x + i, count), shift)), e, count);
        for (size_t c = 0; c < count; ++c) rest_sum += static_cast<double>(e[c]);
      });
  const double sum = hn::GetLane(hn::SumOfLanes(dd, sums)) + rest_sum;
  // All -inf (or a +inf): x - largest is NaN, the answer is the largest itself unless x has a NaN.
  if (std::isinf(largest)) {
    const bool has_nan = std::any_of(x, x + n, [](float v) { return std::isnan(v); });
    return static_cast<double>(has_nan ? std::numeric_limits<float>::quiet_NaN() : largest);
  }
  return static_cast<double>(largest) + std::log(sum);
}

void RopeHalfTarget(float* x, int64_t num_heads, int64_t head_dim, int64_t half, const float* cos,
                    const float* sin) {
  const DF d;
  for (int64_t head = 0; head < num_heads; ++head) {
    float* low = x + head * head_dim;
    float* high = low + half;
    const auto rotate = [&](VF a, VF b, VF c, VF s, VF& new_a, VF& new_b) {
      new_a = hn::Sub(hn::Mul(a, c), hn::Mul(b, s));
      new_b = hn::Add(hn::Mul(b, c), hn::Mul(a, s));
    };
    ForVectors(
        half,
        [&](size_t i) {
          VF a = hn::LoadU(d, low + i);
          VF b = hn::LoadU(d, high + i);
          rotate(a, b, hn::LoadU(d, cos + i), hn::LoadU(d, sin + i), a, b);
          hn::StoreU(a, d, low + i);
          hn::StoreU(b, d, high + i);
        },
        [&](size_t i, size_t count) {
          VF a = LoadPartial(low + i, count);
          VF b = LoadPartial(high + i, count);
          rotate(a, b, LoadPartial(cos + i, count), LoadPartial(sin + i, count), a, b);
          StorePartial(a, low + i, count);
          StorePartial(b, high + i, count);
        });
  }
}

template <Dtype kDtype>
void WidenRowAs(const std::byte* row, int64_t n, float* out) {
  ForVectors(
      n,
      [&](size_t i) { hn::StoreU(Widen<kDtype>(row + i * kElementBytes<kDtype>), DF(), out + i); },
      [&](size_t i, size_t count) {
        StorePartial(WidenPartial<kDtype>(row + i * kElementBytes<kDtype>, count), out + i, count);
      });
}

void WidenRowTarget(const WeightMatrix& w, int64_t row, float* out) {
  if (w.dtype == Dtype::kF32) {
    WidenRowAs<Dtype::kF32>(w.data + row * w.stride() * 4, w.cols, out);
  } else if (w.dtype == Dtype::kBF16) {
    WidenRowAs<Dtype::kBF16>(w.data + row * w.stride() * 2, w.cols, out);
  } else {
    WidenRowAs<Dtype::kF16>(w.data + row * w.stride() * 2, w.cols, out);
  }
}

// Product and sum rounded separately, so that every instruction set gives the same bits.
void AccumulateDoubleTarget(double* sums, double scale, const float* x, int64_t n) {
  const DD dd;
  const hn::Rebind<float, DD> d_half;
  const auto s = hn::Set(dd, scale);
  const auto size = static_cast<size_t>(n);
  size_t i = 0;
  for (; i + kDoubleLanes <= size; i += kDoubleLanes) {
    const auto wide = hn::PromoteTo(dd, hn::LoadU(d_half, x + i));
    hn::StoreU(hn::Add(hn::LoadU(dd, sums + i), hn::Mul(s, wide)), dd, sums + i);
  }
  for (; i < size; ++i) sums[i] += scale * static_cast<double>(x[i]);
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(AccumulateDoubleTarget);
HWY_EXPORT(AddScaledTarget);
HWY_EXPORT(DotTarget);
HWY_EXPORT(LargestMagnitudeTarget);
HWY_EXPORT(LogSumExpTarget);
HWY_EXPORT(RmsNormTarget);
HWY_EXPORT(RopeHalfTarget);
HWY_EXPORT(SoftmaxTarget);
HWY_EXPORT(WidenRowTarget);

void RmsNorm(const float* x, int64_t rows, int64_t n, int64_t ld_x, const float* weight, float eps,
             float* y, int64_t ld_y) {
  HWY_DYNAMIC_DISPATCH(RmsNormTarget)(x, rows, n, ld_x, weight, eps, y, ld_y);
}
// 1 * y is exact, so the fused form is the plain sum.
void AddInPlace(float* x, const float* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(AddScaledTarget)(x, 1.0f, y, n);
}
void AddScaled(float* x, float scale, const float* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(AddScaledTarget)(x, scale, y, n);
}
float LargestMagnitude(const float* x, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(LargestMagnitudeTarget)(x, n);
}
float Dot(const float* a, const float* b, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(DotTarget)(a, b, n);
}
void Softmax(float* x, int64_t rows, int64_t n, int64_t ld) {
  HWY_DYNAMIC_DISPATCH(SoftmaxTarget)(x, rows, n, ld);
}
double LogSumExp(const float* x, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(LogSumExpTarget)(x, n);
}
void RopeHalf(float* x, int64_t num_heads, int64_t head_dim, int64_t half, const float* cos,
              const float* sin) {
  HWY_DYNAMIC_DISPATCH(RopeHalfTarget)(x, num_heads, head_dim, half, cos, sin);
}
void WidenRow(const WeightMatrix& w, int64_t row, float* out) {
  HWY_DYNAMIC_DISPATCH(WidenRowTarget)(w, row, out);
}
void AccumulateDouble(double* sums, double scale, const float* x, int64_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateDoubleTarget)(sums, scale, x, n);
}

}  // namespace winnow
#endif  // HWY_ONCE
