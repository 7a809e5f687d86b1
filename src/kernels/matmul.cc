// Y = X W^T over packed rows.
//
// A task owns a range of row panels and a range of W's rows, so tasks write disjoint parts of Y. It
// goes through k in blocks of kBlockColumns; in a block, for every kTileColumns rows of W: widen
// and transpose them into an L1-resident tile [block, kTileColumns], then stream the packed panels
// against it. An element of Y is, for every partition: the FMA chain over a block's columns in
// order, first block stored, later blocks added in order.
#include "kernels/matmul.h"

#include <algorithm>
#include <string>

#include "base/error.h"          // RuntimeError
#include "kernels/tile_shape.h"  // kBlockColumns

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"
#include "kernels/tile_kernel-inl.h"
#include "kernels/widen_tile-inl.h"

#ifndef WINNOW_KERNELS_MATMUL_TASK_
#define WINNOW_KERNELS_MATMUL_TASK_
namespace winnow {
namespace {

// One product and the part of it a task computes.
struct MatMulTask {
  const float* packed;
  int64_t rows;
  int64_t panels;
  const WeightMatrix* w;
  float* y;
  int64_t ld_y;
  int64_t first_panel, end_panel;    // of X
  int64_t first_column, end_column;  // of Y; first_column is a multiple of the tile's
};

}  // namespace
}  // namespace winnow
#endif  // WINNOW_KERNELS_MATMUL_TASK_

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// Fetches a tile of W into L2 while the one before it is used, a few lines with every panel: rows
// of W are far apart and each gives only kBlockColumns elements, too short for the hardware to
// notice.
class TilePrefetch {
 public:
  TilePrefetch(const WeightMatrix& w, int64_t row, int64_t column, int64_t panels) {
    constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
    const int64_t element_bytes = w.dtype == Dtype::kF32 ? 4 : 2;
    row_bytes_ = w.cols * element_bytes;
    next_ = w.data + row * row_bytes_ + column * element_bytes;
    line_ = 0;
    lines_per_row_ = std::min(kBlockColumns, w.cols - column) * element_bytes / 64 + 1;
    rows_left_ = std::min(kColumns, w.rows - row);
    lines_per_call_ = (lines_per_row_ * rows_left_ + panels - 1) / panels;
  }
  HWY_INLINE void Some() {
    for (int64_t i = 0; i < lines_per_call_ && rows_left_ > 0; ++i) {
      __builtin_prefetch(next_ + 64 * line_, 0, 2);
      if (++line_ == lines_per_row_) {
        line_ = 0;
        next_ += row_bytes_;
        --rows_left_;
      }
    }
  }

 private:
  const std::byte* next_;
  int64_t row_bytes_, line_, lines_per_row_, rows_left_, lines_per_call_;
};

void RunMatMulTask(const MatMulTask& task) {
  constexpr auto kRows = static_cast<int64_t>(kTileRows);
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  HWY_ALIGN float w_tile[kBlockColumns * kColumns];
  const int64_t k = task.w->cols;
  const int64_t task_panels = task.end_panel - task.first_panel;
  for (int64_t first_k = 0; first_k < k; first_k += kBlockColumns) {
    const int64_t block = std::min(kBlockColumns, k - first_k);
    const float* a_block = task.packed + first_k * task.panels * kRows;
    for (int64_t column = task.first_column; column < task.end_column; column += kColumns) {
      WidenTile(*task.w, column, first_k, block, w_tile);
      const int64_t columns = std::min(kColumns, task.end_column - column);
      const bool last = column + kColumns >= task.end_column;
      TilePrefetch prefetch(*task.w, last ? task.first_column : column + kColumns,
                            last ? std::min(first_k + kBlockColumns, k) : first_k, task_panels);
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

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {
namespace {

HWY_EXPORT(RunMatMulTask);

// The grid of tasks a product is cut into. It moves work between threads and caches, never results.
struct Partition {
  int64_t panels_per_task;
  int64_t columns_per_task;
  int64_t row_tasks;
  int64_t column_tasks;
};

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

Partition MakePartition(int64_t panels, int64_t n, int64_t k, const TileShape& tile,
                        int num_threads) {
  // One block of a task's panels stays in an L2 cache of 512 KiB (Zen 2 and 3) while the task's
  // rows of W pass; more rows of W read the panels less often from L3. The part of Y a task comes
  // back to with every block of columns is fetched ahead and may live in L3: measured on Zen 3, 160
  // KiB of Y gives 85 % of the FMA peak with k = 4096 and 640 KiB 90 %.
  constexpr int64_t kFloat = sizeof(float);
  constexpr int64_t kMaxPanelBytes = 384 << 10;
  constexpr int64_t kMaxYBytes = 640 << 10;
  constexpr int64_t kTasksPerThread = 4;
  const int64_t panel_bytes = std::min(k, kBlockColumns) * tile.rows * kFloat;
  const int64_t wanted = num_threads == 1 ? 1 : num_threads * kTasksPerThread;
  Partition p{};
  p.row_tasks = CeilDiv(panels, kMaxPanelBytes / panel_bytes);
  p.panels_per_task = CeilDiv(panels, p.row_tasks);
  const int64_t column_tiles = CeilDiv(n, tile.columns);
  const int64_t tile_bytes = p.panels_per_task * tile.rows * tile.columns * kFloat;
  const int64_t most_tiles =
      k <= kBlockColumns ? column_tiles : std::max<int64_t>(1, kMaxYBytes / tile_bytes);
  const int64_t tiles_per_task =
      std::clamp<int64_t>(column_tiles * p.row_tasks / wanted, 1, most_tiles);
  p.columns_per_task = tiles_per_task * tile.columns;
  p.column_tasks = CeilDiv(column_tiles, tiles_per_task);
  if (p.row_tasks * p.column_tasks < wanted) {  // few columns: cut the rows instead
    p.row_tasks = std::min(panels, CeilDiv(wanted, p.column_tasks));
  }
  p.panels_per_task = CeilDiv(panels, p.row_tasks);
  p.row_tasks = CeilDiv(panels, p.panels_per_task);
  return p;
}

template <class RunTasks>
void MatMulWith(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y, int num_threads,
                const RunTasks& run_tasks) {
  const TileShape tile = ActiveTileShape();
  if (w.cols != x.k()) {
    throw RuntimeError("product of packed rows with k=" + std::to_string(x.k()) +
                       " and a weight of " + std::to_string(w.cols) + " columns");
  }
  if (!IsComputeDtype(w.dtype)) {
    throw RuntimeError("product with a weight stored as " + std::string(DtypeName(w.dtype)));
  }
  if (x.rows() == 0 || w.rows == 0) return;
  if (x.panel_rows() != tile.rows) {
    throw RuntimeError("rows were packed for another instruction set than the one in use");
  }
  if (w.cols == 0) {
    for (int64_t i = 0; i < x.rows(); ++i) std::fill_n(y + i * ld_y, w.rows, 0.0f);
    return;
  }
  const int64_t panels = CeilDiv(x.rows(), tile.rows);
  const Partition p = MakePartition(panels, w.rows, w.cols, tile, num_threads);
  run_tasks(p.row_tasks * p.column_tasks, [&](int64_t index) {
    const int64_t first_panel = index % p.row_tasks * p.panels_per_task;
    const int64_t first_column = index / p.row_tasks * p.columns_per_task;
    HWY_DYNAMIC_DISPATCH(RunMatMulTask)
    ({.packed = x.data(),
      .rows = x.rows(),
      .panels = panels,
      .w = &w,
      .y = y,
      .ld_y = ld_y,
      .first_panel = first_panel,
      .end_panel = std::min(panels, first_panel + p.panels_per_task),
      .first_column = first_column,
      .end_column = std::min(w.rows, first_column + p.columns_per_task)});
  });
}

}  // namespace

void MatMul(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y, ThreadPool& pool) {
  MatMulWith(x, w, y, ld_y, pool.num_threads(), [&](int64_t tasks, const auto& run) {
    pool.Run(tasks, [&](int64_t task, int) { run(task); });
  });
}

void MatMulSingle(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y) {
  MatMulWith(x, w, y, ld_y, 1, [&](int64_t tasks, const auto& run) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
  });
}

}  // namespace winnow
#endif  // HWY_ONCE
