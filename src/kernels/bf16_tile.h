// Products with X rounded to bf16, for CPUs with AVX512_BF16: private to kernels/.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"  // ThreadPool
#include "kernels/matmul.h"    // PackedRows, WeightMatrix

namespace winnow {

// Computes a tile of Y from packed pairs (bf16_tile-inl.h): rows of the active tile shape.
using Bf16TileFunction = void (*)(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t rows,
                                  float* y, int64_t ld_y, bool add);

// Whether this CPU and system have the instructions.
bool CpuHasBf16Dots();
// With the instructions; needs CpuHasBf16Dots() and the tile shape of AVX-512.
void Bf16TileAvx512(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t rows, float* y,
                    int64_t ld_y, bool add);
// Whether "avx512_bf16" is the instruction set in use (targets.cc).
bool Bf16DotsSelected();

// y as MatMul, from X rounded to bf16 (to nearest, ties to even) and a bf16 w, by any tile
// function.
void MatMulBf16(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y,
                ThreadPool& pool, Bf16TileFunction tile);

}  // namespace winnow
