// How a product is cut into tasks: private to kernels/.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/matmul.h"  // PackedRows, WeightMatrix

namespace winnow {

// The part of a product one task computes: some panels of X against some rows of W.
struct MatMulTask {
  const float* packed;  // all of X
  int64_t rows;         // of X
  int64_t panels;       // of X
  const WeightMatrix* w;
  float* y;
  int64_t ld_y;
  int64_t first_panel, end_panel;    // of X
  int64_t first_column, end_column;  // of Y; first_column is a multiple of the tile's
  bool transposed = false;           // Y = X W: W's rows are summed over, its columns are Y's
};

// One block of columns of a task's panels, at most.
inline constexpr int64_t kMaxPanelBytes = 384 << 10;

// Tasks that write disjoint parts of y and all of it together; none if there is nothing to compute.
// RuntimeError if x and w do not fit together. The cut moves work between threads and caches, never
// results.
std::vector<MatMulTask> MakeMatMulTasks(const PackedRows& x, const WeightMatrix& w, float* y,
                                        int64_t ld_y, int num_threads, bool transposed = false);

}  // namespace winnow
