// Fetching W ahead of its use. Included once per target by foreach_target.h, hence the toggled
// guard.
#if defined(WINNOW_KERNELS_TILE_PREFETCH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_TILE_PREFETCH_INL_H_
#undef WINNOW_KERNELS_TILE_PREFETCH_INL_H_
#else
#define WINNOW_KERNELS_TILE_PREFETCH_INL_H_
#endif

#include <algorithm>

#include "kernels/matmul_task.h"  // MatMulTask
#include "kernels/simd-inl.h"
#include "kernels/tile_shape.h"  // kBlockColumns

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// Fetches a tile of W into L2 while the one before it is used, a few lines with every panel: rows
// of W are far apart and each gives only kBlockColumns elements, too short for the hardware to
// notice.
class TilePrefetch {
 public:
  // The tile after the one of Y's columns from `column` and W's columns from `first_k`.
  TilePrefetch(const MatMulTask& task, int64_t column, int64_t first_k) {
    constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
    const WeightMatrix& w = *task.w;
    if (!w.packed.empty()) {  // few bytes in long runs, which the hardware fetches by itself
      next_ = w.data;
      row_bytes_ = line_ = lines_per_row_ = rows_left_ = lines_per_call_ = 0;
      return;
    }
    const bool last = column + kColumns >= task.end_column;
    const int64_t row = last ? task.first_column : column + kColumns;
    const int64_t next_k = last ? std::min(first_k + kBlockColumns, w.cols) : first_k;
    const int64_t panels = task.end_panel - task.first_panel;
    const int64_t element_bytes = w.dtype == Dtype::kF32 ? 4 : 2;
    row_bytes_ = w.stride() * element_bytes;
    next_ = w.data + row * row_bytes_ + next_k * element_bytes;
    line_ = 0;
    lines_per_row_ = std::min(kBlockColumns, w.cols - next_k) * element_bytes / 64 + 1;
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

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_TILE_PREFETCH_INL_H_
