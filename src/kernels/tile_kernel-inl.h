// The inner loop of a product: a tile of Y [rows, kTileColumns] from one packed panel of X and one
// widened tile of W. Included once per target by foreach_target.h, hence the toggled guard.
#if defined(WINNOW_KERNELS_TILE_KERNEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_TILE_KERNEL_INL_H_
#undef WINNOW_KERNELS_TILE_KERNEL_INL_H_
#else
#define WINNOW_KERNELS_TILE_KERNEL_INL_H_
#endif

#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// One column of X and of W added to the sums.
template <size_t kRows>
HWY_INLINE void TileStep(const float* a, const float* b, VF (&sum0)[kRows], VF (&sum1)[kRows]) {
  const DF d;
  const VF b0 = hn::Load(d, b);
  const VF b1 = hn::Load(d, b + kLanes);
  HWY_UNROLL(12)
  for (size_t r = 0; r < kRows; ++r) {
    const VF x = hn::Set(d, a[r]);
    sum0[r] = hn::MulAdd(x, b0, sum0[r]);
    sum1[r] = hn::MulAdd(x, b1, sum1[r]);
  }
}

// y[r, :] (+)= sum over the block of a[k, r] * b[k, :] for the first kRows rows of the panel.
// a [block][kTileRows], b [block][kTileColumns]. Rows are independent chains, so leaving out the
// padding rows of a panel does not change the others.
template <size_t kRows>
HWY_INLINE void TileRows(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int64_t block,
                         float* HWY_RESTRICT y, int64_t ld_y, bool add) {
  const DF d;
  VF sum0[kRows];
  VF sum1[kRows];
  HWY_UNROLL(12)
  for (size_t r = 0; r < kRows; ++r) {
    sum0[r] = sum1[r] = hn::Zero(d);
    // Y is needed only after the whole block: the loads run ahead of it. A and W come in order,
    // which the hardware prefetches by itself.
    const float* row = y + static_cast<int64_t>(r) * ld_y;
    __builtin_prefetch(row);
    __builtin_prefetch(row + kTileColumns - 1);
  }
  int64_t k = 0;
  for (; k + 4 <= block; k += 4) {
    HWY_UNROLL(4)
    for (size_t u = 0; u < 4; ++u) {
      TileStep<kRows>(a + u * kTileRows, b + u * kTileColumns, sum0, sum1);
    }
    a += 4 * kTileRows;
    b += 4 * kTileColumns;
  }
  for (; k < block; ++k) {
    TileStep<kRows>(a, b, sum0, sum1);
    a += kTileRows;
    b += kTileColumns;
  }
  HWY_UNROLL(12)
  for (size_t r = 0; r < kRows; ++r) {
    float* row = y + static_cast<int64_t>(r) * ld_y;
    if (add) {
      sum0[r] = hn::Add(hn::LoadU(d, row), sum0[r]);
      sum1[r] = hn::Add(hn::LoadU(d, row + kLanes), sum1[r]);
    }
    hn::StoreU(sum0[r], d, row);
    hn::StoreU(sum1[r], d, row + kLanes);
  }
}

template <size_t kRows>
HWY_NOINLINE void TileRowsOutOfLine(const float* a, const float* b, int64_t block, float* y,
                                    int64_t ld_y, bool add) {
  TileRows<kRows>(a, b, block, y, ld_y, add);
}

// The last rows of X: one instance per count, found by counting down.
template <size_t kRows>
HWY_INLINE void FewerRows(const float* a, const float* b, int64_t block, int64_t rows, float* y,
                          int64_t ld_y, bool add) {
  if (rows == static_cast<int64_t>(kRows)) {
    TileRowsOutOfLine<kRows>(a, b, block, y, ld_y, add);
  } else if constexpr (kRows > 1) {
    FewerRows<kRows - 1>(a, b, block, rows, y, ld_y, add);
  }
}

// y (+)= the first columns of a whole tile.
HWY_INLINE void CopyTileColumns(const float* tile, int64_t rows, int64_t columns, float* y,
                                int64_t ld_y, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float sum = tile[r * static_cast<int64_t>(kTileColumns) + c];
      y[r * ld_y + c] = add ? y[r * ld_y + c] + sum : sum;
    }
  }
}

// The first `rows` x `columns` of a tile. Past the edge of W the tile repeats W's last row; those
// columns go to a scratch tile and are dropped.
HWY_INLINE void ComputeTile(const float* a, const float* b, int64_t block, int64_t rows,
                            int64_t columns, float* y, int64_t ld_y, bool add) {
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  if (HWY_LIKELY(columns == kColumns)) {
    FewerRows<kTileRows>(a, b, block, rows, y, ld_y, add);
    return;
  }
  HWY_ALIGN float scratch[kTileRows * kTileColumns];
  FewerRows<kTileRows>(a, b, block, rows, scratch, kColumns, false);
  CopyTileColumns(scratch, rows, columns, y, ld_y, add);
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_TILE_KERNEL_INL_H_
