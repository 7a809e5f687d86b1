// Y = X W^T with X rounded to bf16. The tasks are those of matmul.cc; what differs is that two
// columns make one 32-bit unit: a tile of W is transposed without being widened, and a task rounds
// its panels of X once per block of columns.
#include <algorithm>
#include <vector>

#include "base/error.h"  // RuntimeError
#include "kernels/bf16_tile.h"
#include "kernels/matmul_task.h"
#include "kernels/tile_shape.h"  // kBlockColumns

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/bf16_matmul.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"
#include "kernels/tile_kernel-inl.h"
#include "kernels/tile_prefetch-inl.h"
#include "kernels/widen_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// pairs [(columns + 1) / 2][kTileRows] = a panel's block [columns][kTileRows], two columns rounded
// into one unit, the first in the low half; after an odd last column comes 0.
void RoundPanel(const float* panel, int64_t columns, uint32_t* pairs) {
  static_assert(kTileRows % 2 == 0);
  constexpr size_t kStep = kLanes == 1 ? 1 : kTileRows % 4 == 0 ? 4 : 2;
  const hn::CappedTag<float, kStep> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  HWY_ALIGN static constexpr float kZeros[kTileRows] = {};
  // Bits of bf16 in the high half: to nearest even; NaN keeps its sign and becomes quiet.
  const auto round = [&](const float* from) HWY_ATTR {
    const auto value = hn::LoadU(d, from);
    const auto bits = hn::BitCast(du, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
    const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu)));
    const auto quiet = hn::Or(bits, hn::Set(du, 0x400000u));
    return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(value)), quiet, rounded);
  };
  for (int64_t k = 0; k < columns; k += 2, panel += 2 * kTileRows, pairs += kTileRows) {
    const float* second = k + 1 < columns ? panel + kTileRows : kZeros;
    for (size_t r = 0; r < kTileRows; r += kStep) {
      const auto low = hn::ShiftRight<16>(round(panel + r));
      const auto high = hn::And(round(second + r), hn::Set(du, 0xffff0000u));
      hn::StoreU(hn::Or(low, high), du, pairs + r);
    }
  }
}

void RunBf16Task(const MatMulTask& task, Bf16TileFunction compute_tile, uint32_t* x_pairs) {
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  HWY_ALIGN uint32_t w_pairs[(kBlockColumns / 2 + 4) * kColumns];
  HWY_ALIGN float scratch[kRows * kColumns];
  const int64_t k = task.w->cols;
  for (int64_t first_k = 0; first_k < k; first_k += kBlockColumns) {
    const int64_t block = std::min(kBlockColumns, k - first_k);
    const int64_t pairs = (block + 1) / 2;
    const bool add = first_k > 0;
    const float* a_block = task.packed + first_k * task.panels * kRows;
    for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
      RoundPanel(a_block + panel * block * kRows, block,
                 x_pairs + (panel - task.first_panel) * pairs * kRows);
    }
    for (int64_t column = task.first_column; column < task.end_column; column += kColumns) {
      PairTile(*task.w, column, first_k, block, w_pairs);
      const int64_t columns = std::min(kColumns, task.end_column - column);
      TilePrefetch prefetch(task, column, first_k);
      for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
        prefetch.Some();
        const int64_t row = panel * kRows;
        const int64_t rows = std::min(kRows, task.rows - row);
        const uint32_t* a = x_pairs + (panel - task.first_panel) * pairs * kRows;
        float* y = task.y + row * task.ld_y + column;
        if (columns == kColumns) {
          compute_tile(a, w_pairs, pairs, rows, y, task.ld_y, add);
          continue;
        }
        compute_tile(a, w_pairs, pairs, rows, scratch, kColumns, false);
        CopyTileColumns(scratch, rows, columns, y, task.ld_y, add);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(RunBf16Task);

void MatMulBf16(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y,
                ThreadPool& pool, Bf16TileFunction tile) {
  if (w.packed.empty() && w.dtype != Dtype::kBF16) {
    throw RuntimeError("bf16 product with a weight of another format");
  }
  const std::vector<MatMulTask> tasks = MakeMatMulTasks(x, w, y, ld_y, pool.num_threads());
  pool.Run(static_cast<int64_t>(tasks.size()), [&](int64_t index, int) {
    const MatMulTask& task = tasks[static_cast<size_t>(index)];
    const int64_t panels = task.end_panel - task.first_panel;
    const int64_t pairs = (std::min(kBlockColumns, w.cols) + 1) / 2;
    AlignedBuffer<uint32_t> x_pairs(static_cast<size_t>(panels * pairs * x.panel_rows()));
    HWY_DYNAMIC_DISPATCH(RunBf16Task)(task, tile, x_pairs.data());
  });
}

}  // namespace winnow
#endif  // HWY_ONCE
