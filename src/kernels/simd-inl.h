// What every per-target kernel file shares: tile sizes, widening loads and the fixed-order sum of
// lanes. Included once per target by foreach_target.h, hence the toggled guard.
#if defined(WINNOW_KERNELS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_SIMD_INL_H_
#undef WINNOW_KERNELS_SIMD_INL_H_
#else
#define WINNOW_KERNELS_SIMD_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"  // Dtype, LoadAsFloat
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// x86 vectors have a size known at compile time.
#if HWY_TARGET == HWY_SCALAR
inline constexpr size_t kLanes = 1;
#else
inline constexpr size_t kLanes = HWY_MAX_BYTES / sizeof(float);
#endif

// Doubles are half as many per vector: a vector of f32 widens to two.
using DD = hn::ScalableTag<double>;
inline constexpr size_t kDoubleLanes = kLanes > 1 ? kLanes / 2 : 1;

// 6 x 2 accumulators + 2 of W + 1 of X fill the 16 registers of AVX2; AVX-512 has 32.
#if HWY_TARGET == HWY_SCALAR
inline constexpr size_t kTileRows = 4;
#elif HWY_TARGET <= HWY_AVX3
inline constexpr size_t kTileRows = 12;
#else
inline constexpr size_t kTileRows = 6;
#endif
inline constexpr size_t kTileColumns = 2 * kLanes;

// Through void, because clang warns that a byte pointer may be less aligned than T; LoadU allows
// it.
template <class T>
HWY_INLINE const T* As(const std::byte* p) {
  return static_cast<const T*>(static_cast<const void*>(p));
}

// kLanes elements of a stored row as f32.
HWY_INLINE VF WidenF32(const std::byte* p) {
  return hn::LoadU(DF(), As<float>(p));
}
HWY_INLINE VF WidenBf16(const std::byte* p) {
  const hn::RebindToUnsigned<DF> du32;
  const hn::Rebind<uint16_t, DF> du16;
  const auto bits = hn::LoadU(du16, As<uint16_t>(p));
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
}
HWY_INLINE VF WidenF16(const std::byte* p) {
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(DF(), LoadAsFloat(Dtype::kF16, p, 0));
#else
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const auto bits = hn::LoadU(du16, As<uint16_t>(p));
  return hn::PromoteTo(DF(), hn::BitCast(df16, bits));
#endif
}

template <Dtype kDtype>
inline constexpr size_t kElementBytes = kDtype == Dtype::kF32 ? 4 : 2;

template <Dtype kDtype>
HWY_INLINE VF Widen(const std::byte* p) {
  if constexpr (kDtype == Dtype::kF32) {
    return WidenF32(p);
  } else if constexpr (kDtype == Dtype::kBF16) {
    return WidenBf16(p);
  } else {
    return WidenF16(p);
  }
}

// The first `count` < kLanes elements, zeros after them. Never reads past them: a weight may end at
// the end of a mapped file.
template <Dtype kDtype>
HWY_INLINE VF WidenPartial(const std::byte* p, size_t count) {
  HWY_ALIGN std::byte padded[kLanes * sizeof(float)] = {};
  std::memcpy(padded, p, count * kElementBytes<kDtype>);
  return Widen<kDtype>(padded);
}
HWY_INLINE VF LoadPartial(const float* p, size_t count) {
  HWY_ALIGN float padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(float));
  return hn::Load(DF(), padded);
}
HWY_INLINE void StorePartial(VF v, float* p, size_t count) {
  HWY_ALIGN float all[kLanes];
  hn::Store(v, DF(), all);
  std::memcpy(p, all, count * sizeof(float));
}

// Sum of all lanes, order fixed by the lane count.
HWY_INLINE float SumLanes(VF v) {
  return hn::GetLane(hn::SumOfLanes(DF(), v));
}

#if HWY_TARGET != HWY_SCALAR
// The 128-bit blocks of v added: upper half to lower half, down to one.
template <class D>
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> SumBlocks(D, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}
#endif

// sums[i] = the lanes of v[i] added in one fixed order: four vectors at once, by transposing.
HWY_INLINE void SumLanesOfFour(const VF (&v)[4], float* sums) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t i = 0; i < 4; ++i) sums[i] = hn::GetLane(v[i]);
#else
  const DF d;
  const hn::Repartition<double, DF> d_pair;  // moved only
  const VF ab01 = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
  const VF cd01 = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
  const auto ab = hn::BitCast(d_pair, ab01);  // a0 b0 a1 b1 in every block
  const auto cd = hn::BitCast(d_pair, cd01);
  const VF blocks = hn::Add(hn::BitCast(d, hn::InterleaveLower(d_pair, ab, cd)),
                            hn::BitCast(d, hn::InterleaveUpper(d_pair, ab, cd)));
  hn::StoreU(SumBlocks(d, blocks), hn::FixedTag<float, 4>(), sums);
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_SIMD_INL_H_
