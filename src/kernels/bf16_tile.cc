// The only file with AVX512_BF16 instructions. They are allowed function by function and not by
// compiler flags: flags would also apply to inline library functions, of which the linker may keep
// this file's copy for CPUs that cannot run it.
#include "kernels/bf16_tile.h"

#include <immintrin.h>

#define WINNOW_BF16_TARGET __attribute__((target("avx512f,avx512bf16")))
#include "kernels/bf16_tile-inl.h"

namespace winnow {
namespace {

#define WINNOW_BF16_INLINE \
  WINNOW_BF16_TARGET __attribute__((always_inline, artificial)) static inline

struct Avx512Bf16 {
  using Sums = __m512;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kTileRows = 12;

  WINNOW_BF16_INLINE __m512 Zero() { return _mm512_setzero_ps(); }
  WINNOW_BF16_INLINE __m512i LoadPairs(const uint32_t* from) { return _mm512_load_si512(from); }
  WINNOW_BF16_INLINE __m512i BroadcastPair(uint32_t pair) {
    return _mm512_set1_epi32(static_cast<int>(pair));
  }
  WINNOW_BF16_INLINE __m512 AddDots(__m512 sums, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sums, __builtin_bit_cast(__m512bh, x), __builtin_bit_cast(__m512bh, w));
  }
  WINNOW_BF16_INLINE __m512 AddLoaded(__m512 sums, const float* from) {
    return _mm512_add_ps(_mm512_loadu_ps(from), sums);
  }
  WINNOW_BF16_INLINE void Store(__m512 sums, float* to) { _mm512_storeu_ps(to, sums); }
};

}  // namespace

bool CpuHasBf16Dots() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
}

WINNOW_BF16_TARGET void Bf16TileAvx512(const uint32_t* a, const uint32_t* b, int64_t pairs,
                                       int64_t rows, float* y, int64_t ld_y, bool add) {
  Bf16Tile<Avx512Bf16>(a, b, pairs, rows, y, ld_y, add);
}

}  // namespace winnow
