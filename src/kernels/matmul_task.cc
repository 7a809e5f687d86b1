#include "kernels/matmul_task.h"

#include <algorithm>
#include <string>

#include "base/checked_math.h"   // CeilDiv
#include "base/error.h"          // RuntimeError
#include "kernels/tile_shape.h"  // TileShape, kBlockColumns

namespace winnow {
namespace {

struct TaskSize {
  int64_t panels;
  int64_t columns;
};

TaskSize ChooseTaskSize(int64_t panels, int64_t n, int64_t k, const TileShape& tile,
                        int num_threads) {
  // One block of a task's panels stays in an L2 cache of 512 KiB (Zen 2 and 3) while the task's
  // rows of W pass; more rows of W read the panels less often from L3. The part of Y a task comes
  // back to with every block of columns is fetched ahead and may live in L3: measured on Zen 3, 160
  // KiB of Y gives 85 % of the FMA peak with k = 4096 and 640 KiB 90 %.
  constexpr int64_t kFloat = sizeof(float);
  constexpr int64_t kMaxYBytes = 640 << 10;
  constexpr int64_t kTasksPerThread = 4;
  const int64_t panel_bytes = std::min(k, kBlockColumns) * tile.rows * kFloat;
  int64_t row_tasks = CeilDiv(panels, kMaxPanelBytes / panel_bytes);
  const int64_t tile_bytes = CeilDiv(panels, row_tasks) * tile.rows * tile.columns * kFloat;
  const int64_t column_tiles = CeilDiv(n, tile.columns);
  const int64_t most_tiles =
      k <= kBlockColumns ? column_tiles : std::max<int64_t>(1, kMaxYBytes / tile_bytes);
  const int64_t wanted_tasks = num_threads == 1 ? 1 : num_threads * kTasksPerThread;
  const int64_t tiles = std::clamp<int64_t>(column_tiles * row_tasks / wanted_tasks, 1, most_tiles);
  const int64_t column_tasks = CeilDiv(column_tiles, tiles);
  if (row_tasks * column_tasks < wanted_tasks) {  // few columns: cut the rows instead
    row_tasks = std::min(panels, CeilDiv(wanted_tasks, column_tasks));
  }
  return {.panels = CeilDiv(panels, row_tasks), .columns = tiles * tile.columns};
}

}  // namespace

std::vector<MatMulTask> MakeMatMulTasks(const PackedRows& x, const WeightMatrix& w, float* y,
                                        int64_t ld_y, int num_threads, bool transposed) {
  const TileShape tile = ActiveTileShape();
  const int64_t k = transposed ? w.rows : w.cols, n = transposed ? w.cols : w.rows;
  if (k != x.k()) {
    throw RuntimeError("product of packed rows with k=" + std::to_string(x.k()) +
                       " and a weight that is summed over " + std::to_string(k));
  }
  if (w.packed.empty() && !IsComputeDtype(w.dtype)) {
    throw RuntimeError("product with a weight stored as " + std::string(DtypeName(w.dtype)));
  }
  if (x.rows() == 0 || n == 0) return {};
  if (x.panel_rows() != tile.rows) {
    throw RuntimeError("rows were packed for another instruction set than the one in use");
  }
  if (k == 0) {  // sums of nothing
    for (int64_t i = 0; i < x.rows(); ++i) std::fill_n(y + i * ld_y, n, 0.0f);
    return {};
  }
  const int64_t panels = CeilDiv(x.rows(), tile.rows);
  const TaskSize size = ChooseTaskSize(panels, n, k, tile, num_threads);
  std::vector<MatMulTask> tasks;
  // Tasks that share rows of W follow each other, so that only the first reads them from memory.
  for (int64_t column = 0; column < n; column += size.columns) {
    for (int64_t panel = 0; panel < panels; panel += size.panels) {
      tasks.push_back({.packed = x.data(),
                       .rows = x.rows(),
                       .panels = panels,
                       .w = &w,
                       .y = y,
                       .ld_y = ld_y,
                       .first_panel = panel,
                       .end_panel = std::min(panels, panel + size.panels),
                       .first_column = column,
                       .end_column = std::min(n, column + size.columns),
                       .transposed = transposed});
    }
  }
  return tasks;
}

}  // namespace winnow
