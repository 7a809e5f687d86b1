// The only file with AVX512_VNNI instructions, allowed function by function as in bf16_tile.cc.
// Bytes without sign (codes) times bytes with sign (digits of X), four at a time into 32 bits: two
// instructions for 64 weights and both digits.
#ifndef __clang__
// GCC 12 takes the "undefined" operands inside its own intrinsics for variables we forgot to set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <array>

#include "base/packed_format.h"
#include "kernels/packed_dot.h"
#include "kernels/packed_instances.h"  // PackedLayout, WithFormat

#define WINNOW_VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define WINNOW_VNNI_INLINE \
  WINNOW_VNNI_TARGET __attribute__((always_inline, artificial)) static inline

namespace winnow {
namespace {

constexpr int64_t kStride = DigitBytes(DigitForm::kBytes);

// Through void, because clang warns that a byte pointer may be less aligned.
WINNOW_VNNI_INLINE __m512i Load64(const std::byte* from) {
  return _mm512_loadu_si512(static_cast<const void*>(from));
}
WINNOW_VNNI_INLINE __m256i Load32(const std::byte* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(static_cast<const void*>(from)));
}
// DecodeGroup for 16 rows; packed_codes-inl.h has the same for any width.
WINNOW_VNNI_INLINE void LoadGroups(const PackedLayout& layout, const std::byte* halves,
                                   __m512& scale, __m512& minimum) {
  const __m512 factor = _mm512_set1_ps(layout.scale_factor);
  if (!layout.shifted) {
    scale = _mm512_mul_ps(_mm512_cvtph_ps(Load32(halves)), factor);
    minimum = layout.with_minima ? _mm512_cvtph_ps(Load32(halves + layout.groups * kPackedRows * 2))
                                 : _mm512_setzero_ps();
    return;
  }
  const __m256i bits = Load32(halves), mask = _mm256_set1_epi16(kShiftMask);
  scale = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_andnot_si256(mask, bits)), factor);
  const __m512i steps = _mm512_sub_epi32(_mm512_cvtepu16_epi32(_mm256_and_si256(bits, mask)),
                                         _mm512_set1_epi32(kShiftZero));
  minimum = _mm512_mul_ps(
      _mm512_mul_ps(_mm512_cvtepi32_ps(steps), _mm512_set1_ps(layout.shift_step)), scale);
}
WINNOW_VNNI_INLINE __m512i Broadcast(const std::byte* from) {
  int dword = 0;
  __builtin_memcpy(&dword, from, sizeof(dword));
  return _mm512_set1_epi32(dword);
}

// Vector kV of a chunk; packed_codes-inl.h has the same for any width.
template <int kBits, int kV, int kFrom = 0>
WINNOW_VNNI_INLINE __m512i Codes(const std::byte* plane) {
  constexpr int kLeft = kBits - kFrom;
  constexpr int kWidth = kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : kLeft >= 2 ? 2 : 1;
  constexpr int kShift = kV / kWidth * kWidth;
  __m512i bits = Load64(plane + 64 * (kV % kWidth));
  if constexpr (kShift > 0) bits = _mm512_srli_epi32(bits, kShift);
  if constexpr (kWidth < 8) bits = _mm512_and_si512(bits, _mm512_set1_epi8((1 << kWidth) - 1));
  if constexpr (kFrom > 0) bits = _mm512_slli_epi32(bits, kFrom);
  if constexpr (kLeft > kWidth) {
    return _mm512_or_si512(bits, Codes<kBits, kV, kFrom + kWidth>(plane + 64 * kWidth));
  } else {
    return bits;
  }
}

template <int kBits, bool kLevels, int kXRows, int kV = 0>
WINNOW_VNNI_INLINE void AddVectors(const std::byte* chunk, const std::byte* digits, __m512i levels,
                                   __m512i (&high)[kXRows], __m512i (&low)[kXRows]) {
  __m512i codes = Codes<kBits, kV>(chunk);
  if constexpr (kLevels) codes = _mm512_shuffle_epi8(levels, codes);
#pragma GCC unroll 8
  for (int r = 0; r < kXRows; ++r) {
    const std::byte* row = digits + r * kStride + 4 * kV;
    high[r] = _mm512_dpbusd_epi32(high[r], codes, Broadcast(row));
    low[r] = _mm512_dpbusd_epi32(low[r], codes, Broadcast(row + 32));
  }
  if constexpr (kV < 7) {
    AddVectors<kBits, kLevels, kXRows, kV + 1>(chunk, digits, levels, high, low);
  }
}

// A block of 16 rows of W against kXRows rows of X from `first`.
template <int kBits, bool kLevels, int kXRows>
WINNOW_VNNI_TARGET void DotBlock(const PackedDotTask& task, const PackedLayout& layout,
                                 __m512i levels, int64_t first, int64_t block) {
  const std::byte* bytes = task.w->data + static_cast<uint64_t>(block) * layout.block_bytes;
  const std::byte* chunk = bytes + layout.codes_bytes;
  PrefetchScales(chunk, layout.codes_bytes);
  __m512 y[kXRows];
#pragma GCC unroll 8
  for (int r = 0; r < kXRows; ++r) y[r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < layout.chunks; ++c, chunk += 64 * kBits) {
    const int64_t at = c * task.rows + first;
    __m512i high[kXRows], low[kXRows];
#pragma GCC unroll 8
    for (int r = 0; r < kXRows; ++r) high[r] = low[r] = _mm512_setzero_si512();
      // The blocks follow each other: ahead is the next block's memory at the end of this one.
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i) __builtin_prefetch(chunk + kAheadBytes + 64 * i, 0, 2);
    AddVectors<kBits, kLevels, kXRows>(chunk, task.digits + at * kStride, levels, high, low);
    const std::byte* halves = bytes + c / layout.chunks_per_group * kPackedRows * 2;
    __m512 scale, minimum;
    LoadGroups(layout, halves, scale, minimum);
#pragma GCC unroll 8
    for (int r = 0; r < kXRows; ++r) {
      const __m512 x_scale = _mm512_set1_ps(task.scales[at + r]);
      const int32_t x_sum = task.sums[at + r];
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
      sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(layout.zero * x_sum));
      y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, x_scale), y[r]);
      if (layout.with_minima) {
        y[r] = _mm512_fmadd_ps(_mm512_mul_ps(minimum, x_scale),
                               _mm512_set1_ps(static_cast<float>(x_sum)), y[r]);
      }
    }
  }
  const int64_t row = block * kPackedRows;
  const int64_t left = std::min(kPackedRows, task.w->rows - row);
  const auto mask = static_cast<__mmask16>((1u << left) - 1);
#pragma GCC unroll 8
  for (int r = 0; r < kXRows; ++r) {
    _mm512_mask_storeu_ps(task.y + (first + r) * task.ld_y + row, mask, y[r]);
  }
}

template <int kBits, bool kLevels>
WINNOW_VNNI_TARGET void DotBlocks(const PackedDotTask& task) {
  const PackedLayout layout(*task.w);
  alignas(64) uint8_t level_bytes[64];
  const std::array<int8_t, 16> grid = GridLevels(task.w->packed);
  for (size_t i = 0; i < 64; ++i) level_bytes[i] = static_cast<uint8_t>(grid[i % 16] + 128);
  const __m512i levels = _mm512_load_si512(static_cast<const void*>(level_bytes));
  for (int64_t block = task.first_block; block < task.end_block; ++block) {
    int64_t i = 0;
    for (; i + 8 <= task.rows; i += 8) DotBlock<kBits, kLevels, 8>(task, layout, levels, i, block);
    if (i + 4 <= task.rows) {
      DotBlock<kBits, kLevels, 4>(task, layout, levels, i, block);
      i += 4;
    }
    if (i + 2 <= task.rows) {
      DotBlock<kBits, kLevels, 2>(task, layout, levels, i, block);
      i += 2;
    }
    if (i < task.rows) DotBlock<kBits, kLevels, 1>(task, layout, levels, i, block);
  }
}

}  // namespace

bool CpuHasVnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vnni");
}

void RunPackedDotVnni(const PackedDotTask& task) {
  WithFormat(task.w->packed, [&]<int kBits, bool kLevels>() { DotBlocks<kBits, kLevels>(task); });
}

}  // namespace winnow
