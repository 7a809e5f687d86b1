// Y = X W^T for a few rows, where the time is the time to read W: each row of W is read once and
// widened in registers against all rows of X.
#include <algorithm>
#include <string>

#include "base/error.h"  // RuntimeError
#include "kernels/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matvec.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// kXRows x kWRows dot products at once. Each is one vector of partial sums (lane l sums columns l
// modulo kLanes in order) and then the lanes: an order that only k fixes.
template <Dtype kDtype, size_t kXRows, size_t kWRows>
HWY_INLINE void Dots(const float* x, int64_t k, const std::byte* w, float* y, int64_t ld_y) {
  const DF d;
  const auto columns = static_cast<size_t>(k);
  const size_t row_bytes = columns * kElementBytes<kDtype>;
  VF sums[kXRows * kWRows];
  HWY_UNROLL(16)
  for (size_t i = 0; i < kXRows * kWRows; ++i) sums[i] = hn::Zero(d);
  size_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    VF wide[kWRows];
    HWY_UNROLL(8)
    for (size_t j = 0; j < kWRows; ++j) {
      wide[j] = Widen<kDtype>(w + j * row_bytes + c * kElementBytes<kDtype>);
    }
    HWY_UNROLL(8)
    for (size_t i = 0; i < kXRows; ++i) {
      const VF xi = hn::LoadU(d, x + i * columns + c);
      HWY_UNROLL(8)
      for (size_t j = 0; j < kWRows; ++j) {
        sums[i * kWRows + j] = hn::MulAdd(xi, wide[j], sums[i * kWRows + j]);
      }
    }
  }
  if (c < columns) {
    for (size_t i = 0; i < kXRows; ++i) {
      const VF xi = LoadPartial(x + i * columns + c, columns - c);
      for (size_t j = 0; j < kWRows; ++j) {
        const VF wj = WidenPartial<kDtype>(w + j * row_bytes + c * kElementBytes<kDtype>,
                                           columns - c);
        sums[i * kWRows + j] = hn::MulAdd(xi, wj, sums[i * kWRows + j]);
      }
    }
  }
  for (size_t i = 0; i < kXRows; ++i) {
    for (size_t j = 0; j < kWRows; ++j) {
      y[static_cast<int64_t>(i) * ld_y + static_cast<int64_t>(j)] = SumLanes(sums[i * kWRows + j]);
    }
  }
}

// Rows [first, end) of W against kXRows rows of X, kWRows at a time.
template <Dtype kDtype, size_t kXRows, size_t kWRows>
HWY_NOINLINE void DotRows(const float* x, const WeightMatrix& w, int64_t first, int64_t end, float* y,
                          int64_t ld_y) {
  constexpr auto kStep = static_cast<int64_t>(kWRows);
  const int64_t row_bytes = w.cols * static_cast<int64_t>(kElementBytes<kDtype>);
  int64_t j = first;
  for (; j + kStep <= end; j += kStep) {
    Dots<kDtype, kXRows, kWRows>(x, w.cols, w.data + j * row_bytes, y + j, ld_y);
  }
  for (; j < end; ++j) Dots<kDtype, kXRows, 1>(x, w.cols, w.data + j * row_bytes, y + j, ld_y);
}

// Up to 12 sums in registers; more rows of W per step when X has few rows.
template <Dtype kDtype>
void MatVecAs(const float* x, int64_t rows, const WeightMatrix& w, int64_t first, int64_t end,
              float* y, int64_t ld_y) {
  switch (rows) {
    case 1: return DotRows<kDtype, 1, 8>(x, w, first, end, y, ld_y);
    case 2: return DotRows<kDtype, 2, 4>(x, w, first, end, y, ld_y);
    case 3: return DotRows<kDtype, 3, 4>(x, w, first, end, y, ld_y);
    default: return DotRows<kDtype, 4, 2>(x, w, first, end, y, ld_y);
  }
}

// Rows [first, end) of W against `rows` rows of X, four rows of X at a time: a few rows of W stay in
// L1 between the passes.
void MatVecRange(const float* x, int64_t rows, const WeightMatrix& w, int64_t first, int64_t end,
                 float* y, int64_t ld_y) {
  constexpr int64_t kXStep = 4;
  const int64_t w_step = rows <= kXStep ? end - first : 8;
  for (int64_t j = first; j < end; j += w_step) {
    const int64_t j_end = std::min(end, j + w_step);
    for (int64_t i = 0; i < rows; i += kXStep) {
      const int64_t count = std::min(kXStep, rows - i);
      const float* xi = x + i * w.cols;
      float* yi = y + i * ld_y;
      if (w.dtype == Dtype::kF32) {
        MatVecAs<Dtype::kF32>(xi, count, w, j, j_end, yi, ld_y);
      } else if (w.dtype == Dtype::kBF16) {
        MatVecAs<Dtype::kBF16>(xi, count, w, j, j_end, yi, ld_y);
      } else {
        MatVecAs<Dtype::kF16>(xi, count, w, j, j_end, yi, ld_y);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(MatVecRange);

void MatVec(const float* x, int64_t rows, const WeightMatrix& w, float* y, int64_t ld_y,
            ThreadPool& pool) {
  if (!IsComputeDtype(w.dtype)) {
    throw RuntimeError("product with a weight stored as " + std::string(DtypeName(w.dtype)));
  }
  if (rows == 0 || w.rows == 0) return;
  // Tasks of whole groups of 8 rows, about 128 KiB of W each, but enough for every thread.
  constexpr int64_t kGroup = 8;
  constexpr uint64_t kTaskBytes = 128 << 10;
  const int64_t groups = (w.rows + kGroup - 1) / kGroup;
  const int64_t by_bytes = static_cast<int64_t>(w.bytes() / kTaskBytes) + 1;
  const int64_t tasks = std::min(groups, std::max<int64_t>(by_bytes, pool.num_threads()));
  const int64_t step = (groups + tasks - 1) / tasks * kGroup;
  pool.Run((w.rows + step - 1) / step, [&](int64_t task, int) {
    const int64_t first = task * step;
    HWY_DYNAMIC_DISPATCH(MatVecRange)(x, rows, w, first, std::min(w.rows, first + step), y, ld_y);
  });
}

}  // namespace winnow
#endif  // HWY_ONCE
