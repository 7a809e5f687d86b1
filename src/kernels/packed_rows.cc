// Packing of activations: copies rows into the panels that matmul.cc streams through.
//
// Layout: for each block of kBlockColumns columns, for each panel of kTileRows rows,
// [block columns][panel rows]. Blocks are outermost so that what a task reads again and again (all
// panels of one block) is contiguous: with panels outermost, a power-of-two k would put every
// panel's block into the same few cache sets.

#include <algorithm>
#include <cstdint>

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
void PackBlock(const float* const* rows, const float* const*, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; ++k) {
    for (size_t r = 0; r < kTileRows; ++r) *out++ = rows[r][k];
  }
}

#else

// Four columns of all rows: pairs of rows are interleaved, then pairs of floats put in order.
// With 128-bit vectors on every instruction set, because a panel of 6 rows is not a whole number of
// longer ones.
HWY_INLINE void PackFourColumns(const float* const (&rows)[kTileRows], int64_t k,
                                float* HWY_RESTRICT out) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<double, 2> d_pair;  // moved only, never computed with
  constexpr size_t kPairs = kTileRows / 2;
  hn::Vec<decltype(d_pair)> pairs[2][kPairs];  // [first or last two columns][pair of rows]
  HWY_UNROLL(6)
  for (size_t p = 0; p < kPairs; ++p) {
    const auto even = hn::LoadU(d, rows[2 * p] + k);
    const auto odd = hn::LoadU(d, rows[2 * p + 1] + k);
    pairs[0][p] = hn::BitCast(d_pair, hn::InterleaveLower(d, even, odd));
    pairs[1][p] = hn::BitCast(d_pair, hn::InterleaveUpper(d, even, odd));
  }
  HWY_UNROLL(2)
  for (size_t half = 0; half < 2; ++half) {
    HWY_UNROLL(6)
    for (size_t i = 0; i < kPairs; ++i) {
      // Positions among the 2 * kPairs pairs of the two columns, one column after the other.
      const size_t first = 2 * i;
      const size_t second = first + 1;
      hn::Vec<decltype(d_pair)> v;
      if (second < kPairs) {
        v = hn::InterleaveLower(d_pair, pairs[half][first], pairs[half][second]);
      } else if (first >= kPairs) {
        v = hn::InterleaveUpper(d_pair, pairs[half][first - kPairs], pairs[half][second - kPairs]);
      } else {
        v = hn::OddEven(pairs[half][0], pairs[half][first]);
      }
      hn::StoreU(hn::BitCast(d, v), d, out + (half * kPairs + i) * 4);
    }
  }
}

// out [columns][kTileRows] = the rows, transposed. Meanwhile fetches as many columns of
// `next_rows`: rows are read a few hundred bytes at a time, too short for the hardware to run ahead
// by itself.
void PackBlock(const float* const* row_pointers, const float* const* next_rows, int64_t columns,
               float* HWY_RESTRICT out) {
  static_assert(kTileRows % 2 == 0);
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  const float* rows[kTileRows];  // a copy that stores to `out` cannot change stays in registers
  std::copy_n(row_pointers, kTileRows, rows);
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {
    for (size_t r = 0; r < kTileRows; ++r) __builtin_prefetch(next_rows[r] + k);
    HWY_UNROLL(4)
    for (int64_t c = 0; c < 16; c += 4) PackFourColumns(rows, k + c, out + (k + c) * kRows);
  }
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

}  // namespace

void SwiGlu(const float* gate, const float* up, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(SwiGluRow)(gate, up, n, out);
}

namespace {

int64_t NumPanels(int64_t rows, int64_t panel_rows) {
  return (rows + panel_rows - 1) / panel_rows;
}

// Stands for the missing rows of the last panel.
alignas(64) constexpr float kZeroRow[kBlockColumns] = {};

// Packs one panel. row_block(row, r, first, columns) gives columns [first, first + columns) of a
// row, the r-th of the panel; what it gives must stay until the next block of columns.
// row_ahead(row, first) is where the same will be read from soon.
template <class RowBlock, class RowAhead>
void PackPanel(int64_t panel, int64_t rows, int64_t k, int64_t panel_rows, float* data,
               const RowBlock& row_block, const RowAhead& row_ahead) {
  const int64_t panels = NumPanels(rows, panel_rows);
  const int64_t first_row = panel * panel_rows;
  const int64_t count = std::min(panel_rows, rows - first_row);
  const float* pointers[kMaxTileRows];
  const float* next[kMaxTileRows];
  std::fill_n(pointers, kMaxTileRows, kZeroRow);
  std::fill_n(next, kMaxTileRows, kZeroRow);
  for (int64_t first = 0; first < k; first += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, k - first);
    const bool last = first + columns == k;
    for (int64_t r = 0; r < count; ++r) {
      pointers[r] = row_block(first_row + r, r, first, columns);
      const int64_t next_row = std::min(rows - 1, first_row + r + (last ? panel_rows : 0));
      next[r] = row_ahead(next_row, last ? 0 : first + columns);
    }
    float* out = data + (first * panels + panel * columns) * panel_rows;
    HWY_DYNAMIC_DISPATCH(PackBlock)(pointers, next, columns, out);
  }
}

}  // namespace

uint64_t PackedRows::Bytes(int64_t rows, int64_t k) {
  if (rows <= 0 || k <= 0) return 0;
  const int64_t panel_rows = ActiveTileShape().rows;
  const auto padded =
      static_cast<uint64_t>(NumPanels(rows, panel_rows)) * static_cast<uint64_t>(panel_rows);
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
  const auto at = [&](int64_t row, int64_t first) { return x + row * ld + first; };
  pool.Run(NumPanels(rows, panel_rows_), [&](int64_t panel, int) {
    PackPanel(
        panel, rows, k, panel_rows_, buffer_.data(),
        [&](int64_t row, int64_t, int64_t first, int64_t) { return at(row, first); }, at);
  });
}

void PackedRows::PackGathered(const float* x, std::span<const int32_t> index, int64_t k, int64_t ld,
                              ThreadPool& pool) {
  const auto rows = static_cast<int64_t>(index.size());
  Reserve(rows, k);
  const auto at = [&](int64_t row, int64_t first) {
    return x + index[static_cast<size_t>(row)] * ld + first;
  };
  pool.Run(NumPanels(rows, panel_rows_), [&](int64_t panel, int) {
    PackPanel(
        panel, rows, k, panel_rows_, buffer_.data(),
        [&](int64_t row, int64_t, int64_t first, int64_t) { return at(row, first); }, at);
  });
}

void PackedRows::PackTransposed(const float* x, int64_t rows, int64_t k, int64_t ld,
                                ThreadPool& pool) {
  Reserve(rows, k);
  const int64_t panels = NumPanels(rows, panel_rows_);
  // A task takes a block of x's rows, so that each is read from end to end.
  pool.Run((k + kBlockColumns - 1) / kBlockColumns, [&](int64_t block, int) {
    const int64_t first = block * kBlockColumns, columns = std::min(kBlockColumns, k - first);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel * panel_rows_, count = std::min(panel_rows_, rows - row);
      float* out = buffer_.data() + (first * panels + panel * columns) * panel_rows_;
      const float* from = x + first * ld + row;
      for (int64_t c = 0; c < columns; ++c, from += ld, out += panel_rows_) {
        for (int64_t r = 0; r < count; ++r) out[r] = from[r];
        for (int64_t r = count; r < panel_rows_; ++r) out[r] = 0;
      }
    }
  });
}

void PackedRows::PackSwiGlu(const float* gate, const float* up, int64_t rows, int64_t k, int64_t ld,
                            ThreadPool& pool) {
  Reserve(rows, k);
  pool.Run(NumPanels(rows, panel_rows_), [&](int64_t panel, int) {
    alignas(64) float activated[kMaxTileRows][kBlockColumns];
    PackPanel(
        panel, rows, k, panel_rows_, buffer_.data(),
        [&](int64_t row, int64_t r, int64_t first, int64_t columns) {
          const int64_t offset = row * ld + first;
          HWY_DYNAMIC_DISPATCH(SwiGluRow)(gate + offset, up + offset, columns, activated[r]);
          return static_cast<const float*>(activated[r]);
        },
        [&](int64_t row, int64_t first) { return gate + row * ld + first; });
  });
}

}  // namespace winnow
#endif  // HWY_ONCE
