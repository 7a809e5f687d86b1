// Dot products of packed weights with activations as integers: private to kernels/.
//
// A row of activations is cut into chunks of 32 columns, each with a scale: x = scale * q, q a
// whole number of at most 32,512. A product of codes and q over a chunk is an exact integer; chunks
// are added in order in f32 (FMA). So AVX2, AVX-512 and VNNI give the same bits.
#pragma once

#include <cstdint>

#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

// How far ahead of their use packed weights are fetched into L2: at this rate of reading, the time
// RAM takes when it is busy. Measured: 2 KiB gives 55 % of the bandwidth, 16 KiB 75 %.
inline constexpr int64_t kAheadBytes = 16 << 10;

// At the beginning of a block's codes: as its scales lie before them, so many bytes further on were
// not fetched by the block before.
inline void PrefetchScales(const std::byte* codes, uint64_t scales_bytes) {
  const auto bytes = static_cast<int64_t>(scales_bytes);
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(codes + kAheadBytes - bytes + at, 0, 2);
  }
}

// How q of a chunk of one row are stored. kPairsAndBytes: 64 bytes of 16-bit pairs (0, 2), (1, 3),
// (4, 6), (5, 7), .., then kBytes: 32 high digits and 32 low ones, q = 256 high + low, both signed.
enum class DigitForm : uint8_t { kBytes, kPairsAndBytes };
constexpr int64_t DigitBytes(DigitForm form) {
  return form == DigitForm::kBytes ? 64 : 128;
}

// Whether AVX-512 with VNNI is in use, which multiplies bytes and needs them alone.
bool VnniSelected();

// digits [chunks, rows, DigitBytes], scales and sums (of q) [chunks, rows].
void PackDigits(const float* x, int64_t rows, int64_t k, int64_t ld, DigitForm form,
                std::byte* digits, float* scales, int32_t* sums);

struct PackedDotTask {
  const std::byte* digits;
  const float* scales;
  const int32_t* sums;
  int64_t rows;  // of X
  const WeightMatrix* w;
  float* y;
  int64_t ld_y;
  int64_t first_block, end_block;  // of 16 rows of W
};
// From digits as kPairsAndBytes.
void RunPackedDotPairs(const PackedDotTask& task);
// From digits as kBytes, with VNNI instructions; needs CpuHasVnni().
bool CpuHasVnni();
void RunPackedDotVnni(const PackedDotTask& task);

}  // namespace winnow
