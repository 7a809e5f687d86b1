// Y = X W^T over packed rows.
//
// A task owns a range of row panels and a range of W's rows, so tasks write disjoint parts of Y. It
// goes through k in blocks of kBlockColumns; in a block, for every kTileColumns rows of W: widen
// and transpose them into an L1-resident tile [block, kTileColumns], then stream the packed panels
// against it. An element of Y is, for every partition: the FMA chain over a block's columns in
// order, first block stored, later blocks added in order.
#include "kernels/matmul.h"

#include <algorithm>
#include <vector>

#include "kernels/bf16_tile.h"    // MatMulBf16
#include "kernels/matmul_task.h"  // MatMulTask
#include "kernels/tile_shape.h"   // kBlockColumns

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"
#include "kernels/tile_kernel-inl.h"
#include "kernels/tile_prefetch-inl.h"
#include "kernels/widen_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

void RunMatMulTask(const MatMulTask& task) {
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  HWY_ALIGN float w_tile[kBlockColumns * kColumns];
  const int64_t k = task.w->cols;
  for (int64_t first_k = 0; first_k < k; first_k += kBlockColumns) {
    const int64_t block = std::min(kBlockColumns, k - first_k);
    const float* a_block = task.packed + first_k * task.panels * kRows;
    for (int64_t column = task.first_column; column < task.end_column; column += kColumns) {
      WidenTile(*task.w, column, first_k, block, w_tile);
      const int64_t columns = std::min(kColumns, task.end_column - column);
      TilePrefetch prefetch(task, column, first_k);
      for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
        prefetch.Some();
        const int64_t row = panel * kRows;
        const int64_t rows = std::min(kRows, task.rows - row);
        ComputeTile(a_block + panel * block * kRows, w_tile, block, rows, columns,
                    task.y + row * task.ld_y + column, task.ld_y, first_k > 0);
      }
    }
  }
}

// Y = X W: the same order of sums with W's rows in place of its columns.
void RunTransposedTask(const MatMulTask& task) {
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  HWY_ALIGN float w_tile[kBlockColumns * kColumns];
  const int64_t k = task.w->rows;
  for (int64_t first_k = 0; first_k < k; first_k += kBlockColumns) {
    const int64_t block = std::min(kBlockColumns, k - first_k);
    const float* a_block = task.packed + first_k * task.panels * kRows;
    for (int64_t column = task.first_column; column < task.end_column; column += kColumns) {
      WidenPlainTile(*task.w, first_k, column, block, w_tile);
      const int64_t columns = std::min(kColumns, task.end_column - column);
      for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
        const int64_t row = panel * kRows;
        ComputeTile(a_block + panel * block * kRows, w_tile, block,
                    std::min(kRows, task.rows - row), columns, task.y + row * task.ld_y + column,
                    task.ld_y, first_k > 0);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {
namespace {

HWY_EXPORT(RunMatMulTask);
HWY_EXPORT(RunTransposedTask);

}  // namespace

void MatMul(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y, ThreadPool& pool,
            ComputePrecision precision) {
  const bool rounds = w.dtype == Dtype::kBF16 || !w.packed.empty();
  if (precision == ComputePrecision::kAuto && rounds && Bf16DotsSelected()) {
    return MatMulBf16(x, w, y, ld_y, pool, Bf16TileAvx512);
  }
  const std::vector<MatMulTask> tasks = MakeMatMulTasks(x, w, y, ld_y, pool.num_threads());
  pool.Run(static_cast<int64_t>(tasks.size()), [&](int64_t task, int) {
    HWY_DYNAMIC_DISPATCH(RunMatMulTask)(tasks[static_cast<size_t>(task)]);
  });
}

void MatMulSingle(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y) {
  for (const MatMulTask& task : MakeMatMulTasks(x, w, y, ld_y, 1)) {
    HWY_DYNAMIC_DISPATCH(RunMatMulTask)(task);
  }
}

void MatMulTransposed(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y,
                      ThreadPool& pool) {
  const std::vector<MatMulTask> tasks = MakeMatMulTasks(x, w, y, ld_y, pool.num_threads(), true);
  pool.Run(static_cast<int64_t>(tasks.size()), [&](int64_t task, int) {
    HWY_DYNAMIC_DISPATCH(RunTransposedTask)(tasks[static_cast<size_t>(task)]);
  });
}

void MatMulTransposedSingle(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y) {
  for (const MatMulTask& task : MakeMatMulTasks(x, w, y, ld_y, 1, true)) {
    HWY_DYNAMIC_DISPATCH(RunTransposedTask)(task);
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
