// Dot products of packed weights with activations as integers: private to kernels/.
//
// A row of activations is cut into chunks of 32 columns, each with a scale: x = scale * q, q a
// whole number of at most 32,512. A product of codes and q over a chunk is an exact integer; chunks
// are added in order in f32 (FMA). So AVX2, AVX-512 and VNNI give the same bits.
#pragma once

#include <cstdint>

#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

inline constexpr int64_t kDigitBytes = 64;  // of a chunk of one row

// Whether the byte form is in use: AVX-512 with VNNI, which multiplies bytes.
bool VnniSelected();

// digits [chunks, rows, 64 bytes], scales and sums (of q) [chunks, rows]. A chunk's q are 16-bit
// pairs (0, 2), (1, 3), (4, 6), (5, 7), ..; or in the byte form 32 high digits and 32 low ones,
// q = 256 high + low, both signed.
void PackDigits(const float* x, int64_t rows, int64_t k, int64_t ld, bool byte_form,
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
// From digits in 16-bit pairs.
void RunPackedDotPairs(const PackedDotTask& task);
// From digits in the byte form, with VNNI instructions; needs CpuHasVnni().
bool CpuHasVnni();
void RunPackedDotVnni(const PackedDotTask& task);

}  // namespace winnow
