// exp and silu on vectors, with the corners (NaN, infinities, large arguments) settled. Included
// once per target by foreach_target.h, hence the toggled guard.
#if defined(WINNOW_KERNELS_SILU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_SILU_INL_H_
#undef WINNOW_KERNELS_SILU_INL_H_
#else
#define WINNOW_KERNELS_SILU_INL_H_
#endif

#include "hwy/contrib/math/math-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// exp(x) for x <= 0. Highway's Exp turns NaN into 0, which would hide a broken activation.
HWY_INLINE VF ExpNonPositive(VF x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(DF(), x));
}

// x / (1 + exp(-x)), from exp(-|x|) so that nothing overflows: silu(-100) is about -4e-42.
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
