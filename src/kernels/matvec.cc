// Y = X W^T for a few rows, where the time is the time to read W: each row of W is read once and
// widened in registers against all rows of X.
#include "kernels/matvec.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/error.h"          // RuntimeError
#include "kernels/packed_dot.h"  // PackDigits, PackedDotTask

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matvec.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// X in the order Dots reads it: groups of kXStep rows, in a group [step][row][kLanes] with zeros
// after column k. Rows as they come would all be read from the same set of the L1 cache when k is a
// power of two.
inline constexpr int64_t kXStep = 4;

int64_t InterleavedSize(int64_t rows, int64_t k) {
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  return rows * ((k + kStep - 1) / kStep * kStep);
}

void InterleaveRows(const float* x, int64_t rows, int64_t k, int64_t ld, float* out) {
  const DF d;
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  for (int64_t first = 0; first < rows; first += kXStep) {
    const int64_t end = std::min(rows, first + kXStep);
    int64_t c = 0;
    for (; c + kStep <= k; c += kStep) {
      for (int64_t row = first; row < end; ++row, out += kStep) {
        hn::Store(hn::LoadU(d, x + row * ld + c), d, out);
      }
    }
    for (int64_t row = first; c < k && row < end; ++row, out += kStep) {
      hn::Store(LoadPartial(x + row * ld + c, static_cast<size_t>(k - c)), d, out);
    }
  }
}

// kXRows x kWRows dot products at once, x interleaved. Each is one vector of partial sums (lane l
// sums columns l modulo kLanes in order) and then the lanes: an order that only k fixes. `ahead` is
// W's row to fetch meanwhile with the kWRows - 1 after it: rows end before the hardware has learned
// to run ahead.
template <Dtype kDtype, size_t kXRows, size_t kWRows>
HWY_INLINE void Dots(const float* HWY_RESTRICT x, int64_t k, const std::byte* w, size_t row_bytes,
                     const std::byte* ahead, float* HWY_RESTRICT y, int64_t ld_y) {
  const DF d;
  constexpr size_t kElement = kElementBytes<kDtype>;
  constexpr size_t kLineColumns = HWY_MAX(64 / kElement, kLanes);
  const auto columns = static_cast<size_t>(k);
  VF sums[kXRows * kWRows];
  HWY_UNROLL(12)
  for (VF& sum : sums) sum = hn::Zero(d);
  const auto step = [&](const auto& widen) HWY_ATTR {
    VF wide[kWRows];
    HWY_UNROLL(8)
    for (size_t j = 0; j < kWRows; ++j) wide[j] = widen(w + j * row_bytes);
    HWY_UNROLL(4)
    for (size_t i = 0; i < kXRows; ++i) {
      const VF xi = hn::Load(d, x + i * kLanes);
      HWY_UNROLL(8)
      for (size_t j = 0; j < kWRows; ++j) {
        sums[i * kWRows + j] = hn::MulAdd(xi, wide[j], sums[i * kWRows + j]);
      }
    }
    x += kXRows * kLanes;
    w += kLanes * kElement;
  };
  const auto whole = [](const std::byte* p) HWY_ATTR { return Widen<kDtype>(p); };
  size_t c = 0;
  for (; c + kLineColumns <= columns; c += kLineColumns) {
    HWY_UNROLL(8)
    for (size_t j = 0; j < kWRows; ++j) {
      __builtin_prefetch(ahead + j * row_bytes + c * kElement, 0, 2);
    }
    HWY_UNROLL(4)
    for (size_t part = 0; part < kLineColumns; part += kLanes) step(whole);
  }
  for (; c + kLanes <= columns; c += kLanes) step(whole);
  if (c < columns) {
    const size_t left = columns - c;
    step([left](const std::byte* p) HWY_ATTR { return WidenPartial<kDtype>(p, left); });
  }
  HWY_UNROLL(4)
  for (size_t i = 0; i < kXRows; ++i) {
    HWY_UNROLL(8)
    for (size_t j = 0; j < kWRows; ++j) {
      y[static_cast<int64_t>(i) * ld_y + static_cast<int64_t>(j)] = SumLanes(sums[i * kWRows + j]);
    }
  }
}

// Rows [first, end) of W against kXRows rows of X, kWRows at a time.
template <Dtype kDtype, size_t kXRows, size_t kWRows>
HWY_NOINLINE void DotRows(const float* x, const WeightMatrix& w, int64_t first, int64_t end,
                          float* y, int64_t ld_y) {
  constexpr auto kStep = static_cast<int64_t>(kWRows);
  const int64_t row_bytes = w.stride() * static_cast<int64_t>(kElementBytes<kDtype>);
  int64_t j = first;
  for (; j + kStep <= end; j += kStep) {
    const std::byte* rows = w.data + j * row_bytes;
    const bool more = j + 2 * kStep <= w.rows;
    Dots<kDtype, kXRows, kWRows>(x, w.cols, rows, static_cast<size_t>(row_bytes),
                                 more ? rows + kStep * row_bytes : rows, y + j, ld_y);
  }
  for (; j < end; ++j) {
    const std::byte* row = w.data + j * row_bytes;
    Dots<kDtype, kXRows, 1>(x, w.cols, row, static_cast<size_t>(row_bytes), row, y + j, ld_y);
  }
}

// Rows of W this wide are runs of memory of their own: RAM gives a tenth more for four at a time
// than for eight (Zen 4, bf16). The sums are the same.
inline constexpr int64_t kWideColumns = 1024;

// Up to 12 sums, which with W and X fill AVX2's 16 registers: more rows of W when X has few.
template <Dtype kDtype>
void MatVecAs(const float* x, int64_t rows, const WeightMatrix& w, int64_t first, int64_t end,
              float* y, int64_t ld_y) {
  switch (rows) {
    case 1:
      if (w.cols >= kWideColumns) return DotRows<kDtype, 1, 4>(x, w, first, end, y, ld_y);
      return DotRows<kDtype, 1, 8>(x, w, first, end, y, ld_y);
    case 2:
      return DotRows<kDtype, 2, 4>(x, w, first, end, y, ld_y);
    case 3:
      return DotRows<kDtype, 3, 3>(x, w, first, end, y, ld_y);
    default:
      return DotRows<kDtype, 4, 3>(x, w, first, end, y, ld_y);
  }
}

// Rows [first, end) of W against interleaved X, a group of its rows at a time: between the passes a
// few rows of W stay in cache.
void MatVecRange(const float* x, int64_t rows, const WeightMatrix& w, int64_t first, int64_t end,
                 float* y, int64_t ld_y) {
  const int64_t w_step = rows <= kXStep ? end - first : 12;
  for (int64_t j = first; j < end; j += w_step) {
    const int64_t j_end = std::min(end, j + w_step);
    for (int64_t i = 0; i < rows; i += kXStep) {
      const int64_t count = std::min(kXStep, rows - i);
      const float* xi = x + InterleavedSize(i, w.cols);
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

HWY_EXPORT(InterleavedSize);
HWY_EXPORT(InterleaveRows);
HWY_EXPORT(MatVecRange);

namespace {

// A range of W's rows of one job: `first` and `end` count groups of rows.
struct MatVecTask {
  const MatVecJob* job;
  int64_t first, end;
};

// Rows of W that a task takes at once: a multiple of all row counts of the kernels.
int64_t GroupRows(const WeightMatrix& w) {
  return w.packed.empty() ? 24 : kPackedRows;
}

}  // namespace

void VectorRows::Plain(const float* x, int64_t rows, int64_t k, int64_t ld) {
  Grow(interleaved_, HWY_DYNAMIC_DISPATCH(InterleavedSize)(rows, k));
  HWY_DYNAMIC_DISPATCH(InterleaveRows)(x, rows, k, ld, interleaved_.data());
  plain_rows_ = rows;
  plain_k_ = k;
}

void VectorRows::Packed(const float* x, int64_t rows, int64_t k, int64_t ld) {
  const int64_t chunks = (k + kPackedChunkColumns - 1) / kPackedChunkColumns * rows;
  Grow(scales_, chunks);
  Grow(sums_, chunks);
  vnni_ = VnniSelected();
  const DigitForm form = vnni_ ? DigitForm::kBytes : DigitForm::kPairsAndBytes;
  Grow(digits_, chunks * DigitBytes(form));
  PackDigits(x, rows, k, ld, form, digits_.data(), scales_.data(), sums_.data());
  packed_rows_ = rows;
  packed_k_ = k;
}

void MatVec(std::span<const MatVecJob> jobs, ThreadPool& pool) {
  // Long runs of W, because each begins with nothing fetched ahead, but enough for every thread.
  constexpr uint64_t kLeastBytes = 64 << 10, kMostBytes = 1 << 20;
  uint64_t bytes = 0;
  for (const MatVecJob& job : jobs) bytes += job.w->bytes();
  const uint64_t share = bytes / (8 * static_cast<uint64_t>(pool.num_threads()));
  const uint64_t task_bytes = std::clamp(share, kLeastBytes, kMostBytes);
  std::vector<MatVecTask> tasks;
  for (const MatVecJob& job : jobs) {
    const WeightMatrix& w = *job.w;
    const bool packed = !w.packed.empty();
    if (!packed && !IsComputeDtype(w.dtype)) {
      throw RuntimeError("product with a weight stored as " + std::string(DtypeName(w.dtype)));
    }
    const int64_t rows = packed ? job.x->packed_rows_ : job.x->plain_rows_;
    if (rows == 0 || w.rows == 0) continue;
    if ((packed ? job.x->packed_k_ : job.x->plain_k_) != w.cols) {
      throw RuntimeError("product of rows and weights of different widths");
    }
    const int64_t group = GroupRows(w), groups = (w.rows + group - 1) / group;
    const int64_t by_bytes = static_cast<int64_t>(w.bytes() / task_bytes) + 1;
    const int64_t wanted = jobs.size() == 1 ? pool.num_threads() : 1;
    const int64_t parts = std::min(groups, std::max(by_bytes, wanted));
    const int64_t step = (groups + parts - 1) / parts;
    for (int64_t first = 0; first < groups; first += step) {
      tasks.push_back({&job, first, std::min(groups, first + step)});
    }
  }
  pool.Run(static_cast<int64_t>(tasks.size()), [&](int64_t at, int) {
    const MatVecTask& task = tasks[static_cast<size_t>(at)];
    const MatVecJob& job = *task.job;
    const VectorRows& x = *job.x;
    if (!job.w->packed.empty()) {
      const PackedDotTask dot = {.digits = x.digits_.data(),
                                 .scales = x.scales_.data(),
                                 .sums = x.sums_.data(),
                                 .rows = x.packed_rows_,
                                 .w = job.w,
                                 .y = job.y,
                                 .ld_y = job.ld_y,
                                 .first_block = task.first,
                                 .end_block = task.end};
      return x.vnni_ ? RunPackedDotVnni(dot) : RunPackedDotPairs(dot);
    }
    const int64_t group = GroupRows(*job.w);
    HWY_DYNAMIC_DISPATCH(MatVecRange)
    (x.interleaved_.data(), x.plain_rows_, *job.w, task.first * group,
     std::min(job.w->rows, task.end * group), job.y, job.ld_y);
  });
}

void MatVec(const float* x, int64_t rows, const WeightMatrix& w, float* y, int64_t ld_y,
            ThreadPool& pool) {
  if (rows == 0) return;
  VectorRows prepared;
  prepared.For(w, x, rows, w.cols, w.cols);
  const MatVecJob job = {&prepared, &w, y, ld_y};
  MatVec(std::span(&job, 1), pool);
}

}  // namespace winnow
#endif  // HWY_ONCE
