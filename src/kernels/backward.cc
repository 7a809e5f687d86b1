#include "kernels/backward.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/backward.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/silu-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

struct SwiGluVectors {
  VF d_gate, d_up, inner, product;
};

HWY_INLINE SwiGluVectors SwiGluGradient(VF gate, VF up, VF d_inner, VF scale) {
  const DF d;
  const VF one = hn::Set(d, 1.0f);
  const VF e = ExpNonPositive(hn::Neg(hn::Abs(gate)));
  const VF sigmoid = hn::Div(hn::IfThenElse(hn::Lt(gate, hn::Zero(d)), e, one), hn::Add(one, e));
  const VF silu = hn::Mul(gate, sigmoid);
  const VF slope = hn::Mul(sigmoid, hn::MulAdd(gate, hn::Sub(one, sigmoid), one));
  const VF inner = hn::Mul(silu, up);
  const VF scaled = hn::Mul(scale, d_inner);
  return {hn::Mul(hn::Mul(scaled, up), slope), hn::Mul(scaled, silu), hn::Mul(scale, inner),
          hn::Mul(d_inner, inner)};
}

float SwiGluBackwardTarget(const float* gate, const float* up, const float* d_inner, float scale,
                           int64_t n, float* d_gate, float* d_up, float* inner) {
  const DF d;
  const VF s = hn::Set(d, scale);
  VF sum = hn::Zero(d);
  const auto size = static_cast<size_t>(n);
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const SwiGluVectors v =
        SwiGluGradient(hn::LoadU(d, gate + i), hn::LoadU(d, up + i), hn::LoadU(d, d_inner + i), s);
    hn::StoreU(v.d_gate, d, d_gate + i);
    hn::StoreU(v.d_up, d, d_up + i);
    hn::StoreU(v.inner, d, inner + i);
    sum = hn::Add(sum, v.product);
  }
  if (i < size) {
    const size_t left = size - i;
    const SwiGluVectors v = SwiGluGradient(LoadPartial(gate + i, left), LoadPartial(up + i, left),
                                           LoadPartial(d_inner + i, left), s);
    StorePartial(v.d_gate, d_gate + i, left);
    StorePartial(v.d_up, d_up + i, left);
    StorePartial(v.inner, inner + i, left);
    sum = hn::Add(sum, v.product);
  }
  return SumLanes(sum);
}

void AdamWStepTarget(const AdamWFactors& f, const float* gradient, int64_t n, float* weight,
                     float* m, float* v) {
  const DF d;
  const VF scale = hn::Set(d, f.gradient_scale), decay = hn::Set(d, f.decay);
  const VF rest1 = hn::Set(d, f.rest1), beta2 = hn::Set(d, f.beta2);
  const VF rest2 = hn::Set(d, f.rest2), step = hn::Set(d, f.step_size);
  const VF root = hn::Set(d, f.root_bias2), epsilon = hn::Set(d, f.epsilon);
  const auto update = [&](VF g, VF& w, VF& m1, VF& v1) {
    g = hn::Mul(g, scale);
    m1 = hn::MulAdd(hn::Sub(g, m1), rest1, m1);
    v1 = hn::MulAdd(hn::Mul(rest2, g), g, hn::Mul(v1, beta2));
    const VF denominator = hn::Add(hn::Div(hn::Sqrt(v1), root), epsilon);
    w = hn::Sub(hn::Mul(w, decay), hn::Mul(step, hn::Div(m1, denominator)));
  };
  const auto size = static_cast<size_t>(n);
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    VF w = hn::LoadU(d, weight + i), m1 = hn::LoadU(d, m + i), v1 = hn::LoadU(d, v + i);
    update(hn::LoadU(d, gradient + i), w, m1, v1);
    hn::StoreU(w, d, weight + i);
    hn::StoreU(m1, d, m + i);
    hn::StoreU(v1, d, v + i);
  }
  if (i < size) {
    const size_t left = size - i;
    VF w = LoadPartial(weight + i, left), m1 = LoadPartial(m + i, left),
       v1 = LoadPartial(v + i, left);
    update(LoadPartial(gradient + i, left), w, m1, v1);
    StorePartial(w, weight + i, left);
    StorePartial(m1, m + i, left);
    StorePartial(v1, v + i, left);
  }
}

// Two passes: the mean of d_p under p, then p (d_p - mean).
void SoftmaxBackwardTarget(const float* p, float scale, int64_t n, float* d_p) {
  const DF d;
  const auto size = static_cast<size_t>(n);
  VF sum = hn::Zero(d);
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    sum = hn::MulAdd(hn::LoadU(d, p + i), hn::LoadU(d, d_p + i), sum);
  }
  if (i < size) {
    sum = hn::MulAdd(LoadPartial(p + i, size - i), LoadPartial(d_p + i, size - i), sum);
  }
  const VF mean = hn::Set(d, SumLanes(sum)), s = hn::Set(d, scale);
  const auto gradient = [&](VF pv, VF dv) { return hn::Mul(s, hn::Mul(pv, hn::Sub(dv, mean))); };
  for (i = 0; i + kLanes <= size; i += kLanes) {
    hn::StoreU(gradient(hn::LoadU(d, p + i), hn::LoadU(d, d_p + i)), d, d_p + i);
  }
  if (i < size) {
    StorePartial(gradient(LoadPartial(p + i, size - i), LoadPartial(d_p + i, size - i)), d_p + i,
                 size - i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(AdamWStepTarget);
HWY_EXPORT(SoftmaxBackwardTarget);
HWY_EXPORT(SwiGluBackwardTarget);

float SwiGluBackward(const float* gate, const float* up, const float* d_inner, float scale,
                     int64_t n, float* d_gate, float* d_up, float* inner) {
  return HWY_DYNAMIC_DISPATCH(SwiGluBackwardTarget)(gate, up, d_inner, scale, n, d_gate, d_up,
                                                    inner);
}

// r = 1 / sqrt(mean(x^2) + eps): d_x = r w d_y - x r^3 / n sum(w d_y x).
void RmsNormBackward(const float* x, const float* weight, float eps, const float* d_y, int64_t n,
                     float* d_x, double* d_weight) {
  double squares = 0, product = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto value = static_cast<double>(x[i]);
    squares += value * value;
    product += value * static_cast<double>(weight[i] * d_y[i]);
  }
  const double r = 1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps));
  const auto scale = static_cast<float>(r);
  const auto pull = static_cast<float>(r * r * r / static_cast<double>(n) * product);
  for (int64_t i = 0; i < n; ++i) d_x[i] += scale * (weight[i] * d_y[i]) - pull * x[i];
  if (d_weight == nullptr) return;
  for (int64_t i = 0; i < n; ++i) d_weight[i] += static_cast<double>(d_y[i] * (scale * x[i]));
}

void SoftmaxBackward(const float* p, float scale, int64_t n, float* d_p) {
  HWY_DYNAMIC_DISPATCH(SoftmaxBackwardTarget)(p, scale, n, d_p);
}

void AdamWStep(const AdamWFactors& f, const float* gradient, int64_t n, float* weight, float* m,
               float* v) {
  HWY_DYNAMIC_DISPATCH(AdamWStepTarget)(f, gradient, n, weight, m, v);
}

}  // namespace winnow
#endif  // HWY_ONCE
