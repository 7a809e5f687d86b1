// Codes of packed weights in registers. Included once per target by foreach_target.h, hence the
// toggled guard.
#if defined(WINNOW_KERNELS_PACKED_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_PACKED_CODES_INL_H_
#undef WINNOW_KERNELS_PACKED_CODES_INL_H_
#else
#define WINNOW_KERNELS_PACKED_CODES_INL_H_
#endif

#include "base/packed_format.h"        // PackedFormat, GridLevels
#include "kernels/packed_instances.h"  // PackedLayout
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

using DU = hn::RebindToUnsigned<DF>;
using VU = hn::Vec<DU>;
using DI = hn::RebindToSigned<DF>;
using VI = hn::Vec<DI>;

// Vector kV of a chunk (columns 4 kV..4 kV + 3), one row a lane and one column a byte. `plane` is
// the chunk's first byte plus 4 bytes for every row to leave out.
template <int kBits, int kV, int kFrom = 0>
HWY_INLINE VU Codes(const std::byte* plane) {
  constexpr int kLeft = kBits - kFrom;
  constexpr int kWidth = kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : kLeft >= 2 ? 2 : 1;
  constexpr int kShift = kV / kWidth * kWidth;
  const DU d;
  VU bits = hn::LoadU(d, As<uint32_t>(plane + 64 * (kV % kWidth)));
  if constexpr (kShift > 0) bits = hn::ShiftRight<kShift>(bits);
  if constexpr (kWidth < 8) bits = hn::And(bits, hn::Set(d, ((1u << kWidth) - 1) * 0x01010101u));
  if constexpr (kFrom > 0) bits = hn::ShiftLeft<kFrom>(bits);
  if constexpr (kLeft > kWidth) {
    return hn::Or(bits, Codes<kBits, kV, kFrom + kWidth>(plane + 64 * kWidth));
  } else {
    return bits;
  }
}

// The levels of a grid as bytes, plus `offset`, in every block of a vector.
HWY_INLINE hn::Vec<hn::Repartition<uint8_t, DF>> LevelBytes(const PackedFormat& format,
                                                            int offset) {
  HWY_ALIGN uint8_t levels[16];
  const std::array<int8_t, 16> grid = GridLevels(format);
  for (size_t i = 0; i < 16; ++i) levels[i] = static_cast<uint8_t>(grid[i] + offset);
  return hn::LoadDup128(hn::Repartition<uint8_t, DF>(), levels);
}

// DecodeGroup for kLanes rows; `halves` are their scales of a group in a block.
HWY_INLINE void LoadGroups(const PackedLayout& layout, const std::byte* halves, VF& scale,
                           VF& minimum) {
  const DF d;
  if (!layout.shifted) {
    scale = hn::Mul(WidenF16(halves), hn::Set(d, layout.scale_factor));
    minimum = layout.with_minima ? WidenF16(halves + layout.groups * kPackedRows * 2) : hn::Zero(d);
    return;
  }
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const auto bits = hn::LoadU(du16, As<uint16_t>(halves));
  const auto scales = hn::AndNot(hn::Set(du16, kShiftMask), bits);
  scale = hn::Mul(hn::PromoteTo(d, hn::BitCast(df16, scales)), hn::Set(d, layout.scale_factor));
  const VI steps = hn::Sub(hn::PromoteTo(DI(), hn::And(bits, hn::Set(du16, kShiftMask))),
                           hn::Set(DI(), kShiftZero));
  minimum = hn::Mul(hn::Mul(hn::ConvertTo(d, steps), hn::Set(d, layout.shift_step)), scale);
}

#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_PACKED_CODES_INL_H_
