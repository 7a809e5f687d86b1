// Gram matrices of expert outputs: pairs of dot products, upper triangle only.
#include "kernels/elementwise.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gram.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

float PairDot(const float* a, const float* b, int64_t n) {
  const DF d;
  const auto size = static_cast<size_t>(n);
  VF sum = hn::Zero(d);
  size_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    sum = hn::MulAdd(hn::LoadU(d, a + k), hn::LoadU(d, b + k), sum);
  }
  if (k < size) {
    sum = hn::MulAdd(LoadPartial(a + k, size - k), LoadPartial(b + k, size - k), sum);
  }
  return SumLanes(sum);
}

void GramUpperTarget(const float* f, int64_t m, int64_t n, int64_t ld, float* gram) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = i; j < m; ++j) *gram++ = PairDot(f + i * ld, f + j * ld, n);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(GramUpperTarget);

void GramUpper(const float* f, int64_t m, int64_t n, int64_t ld, float* gram) {
  HWY_DYNAMIC_DISPATCH(GramUpperTarget)(f, m, n, ld, gram);
}

}  // namespace winnow
#endif  // HWY_ONCE
