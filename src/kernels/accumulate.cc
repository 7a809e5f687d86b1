#include "kernels/accumulate.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/accumulate.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// Columns are taken in groups that stay in registers while all rows are added.
void AccumulateRowsTarget(double* sums, const float* x, int64_t rows, int64_t ld, int64_t n) {
  const DD dd;
  const hn::Rebind<float, DD> d_half;
  constexpr size_t kGroup = 4;
  const auto size = static_cast<size_t>(n);
  size_t i = 0;
  for (; i + kGroup * kDoubleLanes <= size; i += kGroup * kDoubleLanes) {
    auto s0 = hn::LoadU(dd, sums + i);
    auto s1 = hn::LoadU(dd, sums + i + kDoubleLanes);
    auto s2 = hn::LoadU(dd, sums + i + 2 * kDoubleLanes);
    auto s3 = hn::LoadU(dd, sums + i + 3 * kDoubleLanes);
    const float* row = x + i;
    for (int64_t r = 0; r < rows; ++r, row += ld) {
      s0 = hn::Add(s0, hn::PromoteTo(dd, hn::LoadU(d_half, row)));
      s1 = hn::Add(s1, hn::PromoteTo(dd, hn::LoadU(d_half, row + kDoubleLanes)));
      s2 = hn::Add(s2, hn::PromoteTo(dd, hn::LoadU(d_half, row + 2 * kDoubleLanes)));
      s3 = hn::Add(s3, hn::PromoteTo(dd, hn::LoadU(d_half, row + 3 * kDoubleLanes)));
    }
    hn::StoreU(s0, dd, sums + i);
    hn::StoreU(s1, dd, sums + i + kDoubleLanes);
    hn::StoreU(s2, dd, sums + i + 2 * kDoubleLanes);
    hn::StoreU(s3, dd, sums + i + 3 * kDoubleLanes);
  }
  for (; i < size; ++i) {
    for (int64_t r = 0; r < rows; ++r)
      sums[i] += static_cast<double>(x[r * ld + static_cast<int64_t>(i)]);
  }
}

void AccumulateWeightedTarget(double* plain, double* weighted, double* squared, double weight,
                              const float* x, int64_t n) {
  const DD dd;
  const hn::Rebind<float, DD> d_half;
  const auto w = hn::Set(dd, weight);
  const auto size = static_cast<size_t>(n);
  size_t i = 0;
  for (; i + kDoubleLanes <= size; i += kDoubleLanes) {
    const auto f = hn::PromoteTo(dd, hn::LoadU(d_half, x + i));
    const auto wf = hn::Mul(w, f);
    hn::StoreU(hn::Add(hn::LoadU(dd, plain + i), f), dd, plain + i);
    hn::StoreU(hn::Add(hn::LoadU(dd, weighted + i), wf), dd, weighted + i);
    hn::StoreU(hn::Add(hn::LoadU(dd, squared + i), hn::Mul(w, wf)), dd, squared + i);
  }
  for (; i < size; ++i) {
    const double f = static_cast<double>(x[i]);
    plain[i] += f;
    weighted[i] += weight * f;
    squared[i] += weight * (weight * f);
  }
}

// A vector of f32 added to sums in double.
HWY_INLINE void AddWidened(VF v, hn::Vec<DD>& sum) {
  const DD dd;
#if HWY_TARGET == HWY_SCALAR
  sum = hn::Add(sum, hn::PromoteTo(dd, v));
#else
  const hn::Half<DF> half;
  sum = hn::Add(sum, hn::Add(hn::PromoteTo(dd, hn::LowerHalf(half, v)),
                             hn::PromoteTo(dd, hn::UpperHalf(half, v))));
#endif
}

template <Dtype kDtype>
void RowMoments(const std::byte* row, size_t n, double* absolute, double* square) {
  const DD dd;
  auto sum = hn::Zero(dd), squares = hn::Zero(dd);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF v = Widen<kDtype>(row + i * kElementBytes<kDtype>);
    AddWidened(hn::Abs(v), sum);
    AddWidened(hn::Mul(v, v), squares);
  }
  if (i < n) {
    const VF v = WidenPartial<kDtype>(row + i * kElementBytes<kDtype>, n - i);
    AddWidened(hn::Abs(v), sum);
    AddWidened(hn::Mul(v, v), squares);
  }
  *absolute += hn::GetLane(hn::SumOfLanes(dd, sum));
  *square += hn::GetLane(hn::SumOfLanes(dd, squares));
}

void RowMomentsTarget(const std::byte* row, Dtype dtype, int64_t n, double* absolute,
                      double* square) {
  const auto size = static_cast<size_t>(n);
  switch (dtype) {
    case Dtype::kBF16:
      return RowMoments<Dtype::kBF16>(row, size, absolute, square);
    case Dtype::kF16:
      return RowMoments<Dtype::kF16>(row, size, absolute, square);
    default:
      return RowMoments<Dtype::kF32>(row, size, absolute, square);
  }
}

template <int64_t kRows, bool kTwo>
HWY_INLINE void SubtractRows(const double* const* rows, int64_t first, const double* a,
                             const double* b, int64_t n, double* x, double* y) {
  const DD d;
  constexpr auto kStep = static_cast<int64_t>(kDoubleLanes);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    auto to = hn::LoadU(d, x + i);
    auto second = kTwo ? hn::LoadU(d, y + i) : hn::Zero(d);
    for (int64_t r = 0; r < kRows; ++r) {
      const auto row = hn::LoadU(d, rows[r] + first + i);
      to = hn::NegMulAdd(hn::Set(d, a[r]), row, to);
      if (kTwo) second = hn::NegMulAdd(hn::Set(d, b[r]), row, second);
    }
    hn::StoreU(to, d, x + i);
    if (kTwo) hn::StoreU(second, d, y + i);
  }
  for (; i < n; ++i) {
    for (int64_t r = 0; r < kRows; ++r) {
      x[i] = std::fma(-a[r], rows[r][first + i], x[i]);
      if (kTwo) y[i] = std::fma(-b[r], rows[r][first + i], y[i]);
    }
  }
}

// Four rows at a time: what is summed into is loaded and stored for four of them.
template <bool kTwo>
HWY_INLINE void SubtractAllRows(const double* const* rows, int64_t num_rows, int64_t first,
                                const double* a, const double* b, int64_t n, double* x, double* y) {
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4) {
    SubtractRows<4, kTwo>(rows + r, first, a + r, kTwo ? b + r : nullptr, n, x, y);
  }
  for (; r < num_rows; ++r) {
    SubtractRows<1, kTwo>(rows + r, first, a + r, kTwo ? b + r : nullptr, n, x, y);
  }
}

void SubtractScaledRowsTarget(const double* const* rows, int64_t num_rows, int64_t first,
                              const double* a, const double* b, int64_t n, double* x, double* y) {
  if (y == nullptr) {
    SubtractAllRows<false>(rows, num_rows, first, a, b, n, x, y);
  } else {
    SubtractAllRows<true>(rows, num_rows, first, a, b, n, x, y);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(AccumulateRowsTarget);
HWY_EXPORT(AccumulateWeightedTarget);
HWY_EXPORT(RowMomentsTarget);
HWY_EXPORT(SubtractScaledRowsTarget);

void AccumulateRows(double* sums, const float* x, int64_t rows, int64_t ld, int64_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateRowsTarget)(sums, x, rows, ld, n);
}
void AccumulateRowsReference(double* sums, const float* x, int64_t rows, int64_t ld, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(x[r * ld + i]);
  }
}

void AccumulateWeighted(double* plain, double* weighted, double* squared, double weight,
                        const float* x, int64_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateWeightedTarget)(plain, weighted, squared, weight, x, n);
}
void AccumulateWeightedReference(double* plain, double* weighted, double* squared, double weight,
                                 const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double f = static_cast<double>(x[i]);
    plain[i] += f;
    weighted[i] += weight * f;
    squared[i] += weight * (weight * f);
  }
}

void AccumulateMoments(const WeightMatrix& w, double* absolute, double* square) {
  const auto moments = HWY_DYNAMIC_DISPATCH(RowMomentsTarget);
  if (!w.packed.empty()) {  // block by block as f32
    std::vector<float> rows(static_cast<size_t>(kPackedRows * w.cols));
    const auto row_bytes = w.cols * static_cast<int64_t>(sizeof(float));
    for (int64_t first = 0; first < w.rows; first += kPackedRows) {
      UnpackBlock(w.packed, w.cols, w.data + PackedBytes(w.packed, first, w.cols), rows.data());
      for (int64_t r = 0; r < std::min(kPackedRows, w.rows - first); ++r) {
        moments(std::as_bytes(std::span(rows)).data() + r * row_bytes, Dtype::kF32, w.cols,
                absolute, square);
      }
    }
    return;
  }
  const auto row_bytes = static_cast<int64_t>(DtypeBits(w.dtype) / 8) * w.stride();
  for (int64_t r = 0; r < w.rows; ++r) {
    moments(w.data + r * row_bytes, w.dtype, w.cols, absolute, square);
  }
}
void AccumulateMomentsReference(const WeightMatrix& w, double* absolute, double* square) {
  for (int64_t r = 0; r < w.rows; ++r) {
    for (int64_t c = 0; c < w.cols; ++c) {
      const auto v = static_cast<double>(
          w.packed.empty() ? LoadAsFloat(w.dtype, w.data, static_cast<size_t>(r * w.stride() + c))
                           : LoadPackedValue(w.packed, w.cols, r, c, w.data));
      *absolute += std::abs(v);
      *square += v * v;
    }
  }
}

void SubtractScaledRows(std::span<const double* const> rows, int64_t first, const double* a,
                        const double* b, int64_t n, double* x, double* y) {
  HWY_DYNAMIC_DISPATCH(SubtractScaledRowsTarget)
  (rows.data(), std::ssize(rows), first, a, b, n, x, y);
}
void SubtractScaledRowsReference(std::span<const double* const> rows, int64_t first,
                                 const double* a, const double* b, int64_t n, double* x,
                                 double* y) {
  for (size_t r = 0; r < rows.size(); ++r) {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = std::fma(-a[r], rows[r][first + i], x[i]);
      if (y != nullptr) y[i] = std::fma(-b[r], rows[r][first + i], y[i]);
    }
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
