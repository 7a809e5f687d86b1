// exp and silu on vectors, with the corners (NaN, infinities, large arguments) settled. Included
// once per target by foreach_target.h, hence the toggled guard.
#if defined(WINNOW_KERNELS_SILU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_SILU_INL_H_
#undef WINNOW_KERNELS_SILU_INL_H_
#else
#define WINNOW_KERNELS_SILU_INL_H_
#endif

#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// exp(x) for x <= 0, within 2 units in the last place down to x = -87, then 0. NaN stays NaN
// (Highway's own Exp turns it into 0, which would hide a broken activation, and takes twice the
// time because it covers positive x too). 2^n times the polynomial of Cephes' expf on the
// remainder.
HWY_INLINE VF ExpNonPositive(VF x) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const VF lowest = hn::Set(d, -88.0f);  // n = -127 there: the scale below is 0
  const VF clamped = hn::IfThenElse(hn::Lt(x, lowest), lowest, x);
  const auto n = hn::NearestInt(hn::Mul(clamped, hn::Set(d, 1.44269504f)));
  const VF n_float = hn::ConvertTo(d, n);
  // ln(2) in two parts, the first with so few bits that n times it is exact.
  VF r = hn::NegMulAdd(n_float, hn::Set(d, 0.693359375f), clamped);
  r = hn::NegMulAdd(n_float, hn::Set(d, -2.12194440e-4f), r);
  VF p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const VF scale = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
  return hn::Mul(p, scale);
}

// x / (1 + exp(-x)), from exp(-|x|) so that nothing overflows: silu(-100) is -0.
HWY_INLINE VF Silu(VF x) {
  const DF d;
  const VF one = hn::Set(d, 1.0f);
  const VF e = ExpNonPositive(hn::Neg(hn::Abs(x)));
  const VF numerator = hn::IfThenElse(hn::Lt(x, hn::Zero(d)), hn::Mul(x, e), x);
  return hn::Div(numerator, hn::Add(one, e));
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_SILU_INL_H_
