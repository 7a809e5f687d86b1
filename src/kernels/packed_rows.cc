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

// out [columns][kTileRows] = transposed rows[0..count) from column `first`; zeros in missing rows.
void PackBlock(const float* const* rows, int64_t count, int64_t first, int64_t columns, float* out) {
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < columns; ++k) {
      out[k * kRows + r] = r < count ? rows[r][first + k] : 0.0f;
    }
  }
}

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

// Calls fill(row, first column, columns) -> pointer to those columns, panel by panel and block by block.
template <class RowBlock>
void PackPanel(int64_t panel, int64_t rows, int64_t k, int64_t panel_rows, float* data,
               const RowBlock& row_block) {
  const int64_t panels = NumPanels(rows, panel_rows);
  const int64_t count = std::min(panel_rows, rows - panel * panel_rows);
  const float* pointers[kMaxTileRows] = {};
  for (int64_t first = 0; first < k; first += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, k - first);
    for (int64_t r = 0; r < count; ++r) {
      pointers[r] = row_block(panel * panel_rows + r, r, first, columns);
    }
    float* out = data + (first * panels + panel * columns) * panel_rows;
    HWY_DYNAMIC_DISPATCH(PackBlock)(pointers, count, 0, columns, out);
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
