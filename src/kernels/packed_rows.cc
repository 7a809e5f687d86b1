// Packing of activations: copies rows into the panels that matmul.cc streams through.
//
// Layout: for each block of kBlockColumns columns, for each panel of kTileRows rows,
// [block columns][panel rows]. Blocks are outermost so that what a task reads again and again (all
// panels of one block) is contiguous: with panels outermost, a power-of-two k would put every
// panel's block into the same few cache sets.
#include <algorithm>
#include <limits>

#include "base/checked_math.h"   // CheckedMul
#include "base/error.h"          // RuntimeError
#include "kernels/matmul.h"      // PackedRows
#include "kernels/tile_shape.h"  // kBlockColumns

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/packed_rows.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/silu-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

// out [columns][kTileRows] = the rows, transposed.
void PackBlock(const float* const* rows, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; ++k) {
    for (size_t r = 0; r < kTileRows; ++r) *out++ = rows[r][k];
  }
}

#else

// Four columns of all rows: pairs of rows are interleaved, then pairs of floats put in order.
// With 128-bit vectors on every instruction set, because a panel of 6 rows is not a whole number of
// longer ones.
HWY_INLINE void PackFourColumns(const float* const* rows, int64_t k, float* out) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<double, 2> pair;  // moved only, never computed with
  constexpr size_t kPairs = kTileRows / 2;
  using VPair = hn::Vec<decltype(pair)>;
  HWY_UNROLL(2)
  for (size_t half = 0; half < 2; ++half) {
    // [column][pair] of two columns, one after the other.
    VPair pairs[kPairs];
    HWY_UNROLL(6)
    for (size_t p = 0; p < kPairs; ++p) {
      const auto even = hn::LoadU(d, rows[2 * p] + k);
      const auto odd = hn::LoadU(d, rows[2 * p + 1] + k);
      pairs[p] = hn::BitCast(pair, half == 0 ? hn::InterleaveLower(d, even, odd)
                                             : hn::InterleaveUpper(d, even, odd));
    }
    HWY_UNROLL(6)
    for (size_t i = 0; i < kPairs; ++i) {
      const size_t first = 2 * i;  // positions of the output among the 2 * kPairs pairs
      const size_t second = first + 1;
      VPair v;
      if (second < kPairs) {
        v = hn::InterleaveLower(pair, pairs[first], pairs[second]);
      } else if (first >= kPairs) {
        v = hn::InterleaveUpper(pair, pairs[first - kPairs], pairs[second - kPairs]);
      } else {
        v = hn::OddEven(pairs[0], pairs[first]);
      }
      hn::StoreU(hn::BitCast(d, v), d, out + half * 2 * kTileRows + 4 * i);
    }
  }
}

// out [columns][kTileRows] = the rows, transposed.
void PackBlock(const float* const* rows, int64_t columns, float* out) {
  static_assert(kTileRows % 2 == 0);
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  int64_t k = 0;
  for (; k + 4 <= columns; k += 4) PackFourColumns(rows, k, out + k * kRows);
  for (; k < columns; ++k) {
    for (int64_t r = 0; r < kRows; ++r) out[k * kRows + r] = rows[r][k];
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

// out[i] = silu(gate[i]) * up[i].
void SwiGluRow(const float* gate, const float* up, int64_t n, float* out) {
  const DF d;
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    hn::StoreU(hn::Mul(Silu(hn::LoadU(d, gate + i)), hn::LoadU(d, up + i)), d, out + i);
  }
  if (i < n) {
    const auto left = static_cast<size_t>(n - i);
    StorePartial(hn::Mul(Silu(LoadPartial(gate + i, left)), LoadPartial(up + i, left)), out + i,
                 left);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {
namespace {

HWY_EXPORT(PackBlock);
HWY_EXPORT(SwiGluRow);

constexpr int64_t kMaxTileRows = 16;

int64_t NumPanels(int64_t rows, int64_t panel_rows) { return (rows + panel_rows - 1) / panel_rows; }

// Stands for the missing rows of the last panel.
alignas(64) constexpr float kZeroRow[kBlockColumns] = {};

// Packs one panel. row_block(row, r, first, columns) gives columns [first, first + columns) of a row,
// the r-th of the panel; what it gives must stay until the next block of columns.
template <class RowBlock>
void PackPanel(int64_t panel, int64_t rows, int64_t k, int64_t panel_rows, float* data,
               const RowBlock& row_block) {
  const int64_t panels = NumPanels(rows, panel_rows);
  const int64_t count = std::min(panel_rows, rows - panel * panel_rows);
  const float* pointers[kMaxTileRows];
  std::fill_n(pointers, kMaxTileRows, kZeroRow);
  for (int64_t first = 0; first < k; first += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, k - first);
    for (int64_t r = 0; r < count; ++r) {
      pointers[r] = row_block(panel * panel_rows + r, r, first, columns);
    }
    float* out = data + (first * panels + panel * columns) * panel_rows;
    HWY_DYNAMIC_DISPATCH(PackBlock)(pointers, columns, out);
  }
}

}  // namespace

uint64_t PackedRows::Bytes(int64_t rows, int64_t k) {
  if (rows <= 0 || k <= 0) return 0;
  const int64_t panel_rows = ActiveTileShape().rows;
  const auto padded = static_cast<uint64_t>(NumPanels(rows, panel_rows)) *
                      static_cast<uint64_t>(panel_rows);
  return CheckedMul(CheckedMul(padded, static_cast<uint64_t>(k), "packed rows"), sizeof(float),
                    "packed rows");
}

void PackedRows::Reserve(int64_t rows, int64_t k) {
  if (rows < 0 || k < 0) throw RuntimeError("packed rows: negative size");
  const uint64_t count = Bytes(rows, k) / sizeof(float);
  // Freed before the new one is taken, so that growing never holds both.
  if (count > buffer_.size()) {
    buffer_ = AlignedBuffer<float>();
    buffer_ = AlignedBuffer<float>(count);
  }
  rows_ = rows;
  k_ = k;
  panel_rows_ = ActiveTileShape().rows;
}

void PackedRows::Pack(const float* x, int64_t rows, int64_t k, int64_t ld, ThreadPool& pool) {
  Reserve(rows, k);
  pool.Run(NumPanels(rows, panel_rows_), [&](int64_t panel, int) {
    PackPanel(panel, rows, k, panel_rows_, buffer_.data(),
              [&](int64_t row, int64_t, int64_t first, int64_t) { return x + row * ld + first; });
  });
}

void PackedRows::PackGathered(const float* x, std::span<const int32_t> index, int64_t k, int64_t ld,
                              ThreadPool& pool) {
  const auto rows = static_cast<int64_t>(index.size());
  Reserve(rows, k);
  pool.Run(NumPanels(rows, panel_rows_), [&](int64_t panel, int) {
    PackPanel(panel, rows, k, panel_rows_, buffer_.data(),
              [&](int64_t row, int64_t, int64_t first, int64_t) {
                return x + index[static_cast<size_t>(row)] * ld + first;
              });
  });
}

void PackedRows::PackSwiGlu(const float* gate, const float* up, int64_t rows, int64_t k, int64_t ld,
                            ThreadPool& pool) {
  Reserve(rows, k);
  pool.Run(NumPanels(rows, panel_rows_), [&](int64_t panel, int) {
    alignas(64) float activated[kMaxTileRows][kBlockColumns];
    PackPanel(panel, rows, k, panel_rows_, buffer_.data(),
              [&](int64_t row, int64_t r, int64_t first, int64_t columns) {
                const int64_t offset = row * ld + first;
                HWY_DYNAMIC_DISPATCH(SwiGluRow)(gate + offset, up + offset, columns, activated[r]);
                return static_cast<const float*>(activated[r]);
              });
  });
}

}  // namespace winnow
#endif  // HWY_ONCE
