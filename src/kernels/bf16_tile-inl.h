// The inner loop of a product of bf16 pairs, over a set of vector operations: the AVX512_BF16
// instructions in bf16_tile.cc, plain loops in the test that proves this logic on any CPU. The
// includer defines WINNOW_BF16_TARGET, the attribute that allows those instructions (or nothing).
#pragma once

#include <cstddef>
#include <cstdint>

namespace winnow {

// y[r, :] (+)= sum over the block's pairs of columns, a pair of bf16 in 32 bits.
// a [pairs][Ops::kTileRows], b [pairs][2 * Ops::kLanes]; every row is an independent chain.
template <class Ops, size_t kRows>
WINNOW_BF16_TARGET void Bf16TileRows(const uint32_t* a, const uint32_t* b, int64_t pairs, float* y,
                                     int64_t ld_y, bool add) {
  typename Ops::Sums sum0[kRows];
  typename Ops::Sums sum1[kRows];
#pragma GCC unroll 12
  for (size_t r = 0; r < kRows; ++r) {
    sum0[r] = sum1[r] = Ops::Zero();
    // Y has left the near caches since its last block of columns.
    const float* row = y + static_cast<int64_t>(r) * ld_y;
    __builtin_prefetch(row);
    __builtin_prefetch(row + 2 * Ops::kLanes - 1);
  }
  for (int64_t k = 0; k < pairs; ++k) {
    const auto b0 = Ops::LoadPairs(b);
    const auto b1 = Ops::LoadPairs(b + Ops::kLanes);
#pragma GCC unroll 12
    for (size_t r = 0; r < kRows; ++r) {
      const auto x = Ops::BroadcastPair(a[r]);
      sum0[r] = Ops::AddDots(sum0[r], x, b0);
      sum1[r] = Ops::AddDots(sum1[r], x, b1);
    }
    a += Ops::kTileRows;
    b += 2 * Ops::kLanes;
  }
#pragma GCC unroll 12
  for (size_t r = 0; r < kRows; ++r) {
    float* row = y + static_cast<int64_t>(r) * ld_y;
    if (add) {
      sum0[r] = Ops::AddLoaded(sum0[r], row);
      sum1[r] = Ops::AddLoaded(sum1[r], row + Ops::kLanes);
    }
    Ops::Store(sum0[r], row);
    Ops::Store(sum1[r], row + Ops::kLanes);
  }
}

// The first `rows` of the panel: one instance per count, found by counting down.
template <class Ops, size_t kRows = Ops::kTileRows>
WINNOW_BF16_TARGET void Bf16Tile(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t rows,
                                 float* y, int64_t ld_y, bool add) {
  if (rows == static_cast<int64_t>(kRows)) {
    Bf16TileRows<Ops, kRows>(a, b, pairs, y, ld_y, add);
  } else if constexpr (kRows > 1) {
    Bf16Tile<Ops, kRows - 1>(a, b, pairs, rows, y, ld_y, add);
  }
}

}  // namespace winnow
