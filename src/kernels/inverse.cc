#include "kernels/inverse.h"

#include <algorithm>
#include <cmath>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/inverse.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// Rows of c a register tile holds; its columns are kVectors vectors.
inline constexpr int64_t kRowsOfTile = 4;
inline constexpr int64_t kVectors = 3;
// Of the inner dimension at a time: so much of b's columns stays in the first cache.
inline constexpr int64_t kInnerOfTile = 128;
inline constexpr int64_t kRowsAtMost = 64;  // of c

// A part of a product's left side: element (row, inner) is at row * row_stride + inner *
// inner_stride.
struct LeftPart {
  const double* data = nullptr;
  int64_t row_stride = 0, inner_stride = 0;
};

// One tile: c[kRows, kWidth vectors] -= a b, with b [inner, kWidth vectors] contiguous.
template <int64_t kRows, int64_t kWidth>
HWY_INLINE void SubtractTile(double* c, int64_t ld_c, LeftPart a, const double* b, int64_t inner) {
  const DD d;
  constexpr auto kStep = static_cast<int64_t>(kDoubleLanes);
  hn::Vec<DD> sum[kRows * kWidth];
  for (auto& s : sum) s = hn::Zero(d);
  for (int64_t i = 0; i < inner; ++i) {
    hn::Vec<DD> right[kWidth];
    for (int64_t v = 0; v < kWidth; ++v) right[v] = hn::LoadU(d, b + v * kStep);
    HWY_UNROLL(4)
    for (int64_t r = 0; r < kRows; ++r) {
      const auto left = hn::Set(d, a.data[r * a.row_stride]);
      HWY_UNROLL(3)
      for (int64_t v = 0; v < kWidth; ++v) {
        sum[r * kWidth + v] = hn::MulAdd(left, right[v], sum[r * kWidth + v]);
      }
    }
    a.data += a.inner_stride;
    b += kWidth * kStep;
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kWidth; ++v) {
      double* to = c + r * ld_c + v * kStep;
      hn::StoreU(hn::Sub(hn::LoadU(d, to), sum[r * kWidth + v]), d, to);
    }
  }
}

// c [rows, kWidth vectors] -= a b. Columns of b are gathered first: rows of a large matrix lie
// whole pages apart, and all would fall into the same few lines of a cache.
template <int64_t kWidth>
HWY_INLINE void SubtractColumns(double* c, int64_t ld_c, const LeftPart& a, const double* b,
                                int64_t ld_b, int64_t rows, int64_t inner) {
  const DD d;
  constexpr auto kStep = static_cast<int64_t>(kDoubleLanes);
  HWY_ALIGN double columns[kInnerOfTile * kWidth * kStep];
  for (int64_t i = 0; i < inner; ++i) {
    for (int64_t v = 0; v < kWidth; ++v) {
      hn::Store(hn::LoadU(d, b + i * ld_b + v * kStep), d, columns + (i * kWidth + v) * kStep);
    }
  }
  int64_t row = 0;
  const auto at = [&](int64_t first) {
    return LeftPart{a.data + first * a.row_stride, a.row_stride, a.inner_stride};
  };
  for (; row + kRowsOfTile <= rows; row += kRowsOfTile) {
    SubtractTile<kRowsOfTile, kWidth>(c + row * ld_c, ld_c, at(row), columns, inner);
  }
  for (; row < rows; ++row) SubtractTile<1, kWidth>(c + row * ld_c, ld_c, at(row), columns, inner);
}

// Gathers `part` [rows, inner], contiguous along the dimension in which it is so already: as with
// columns of b, its rows may lie pages apart.
inline LeftPart Gather(const LeftPart& part, int64_t rows, int64_t inner, double* to) {
  const bool by_rows = part.inner_stride == 1;
  const int64_t lines = by_rows ? rows : inner, length = by_rows ? inner : rows;
  const int64_t stride = by_rows ? part.row_stride : part.inner_stride;
  for (int64_t line = 0; line < lines; ++line) {
    std::copy_n(part.data + line * stride, length, to + line * length);
  }
  return by_rows ? LeftPart{to, length, 1} : LeftPart{to, 1, length};
}

// c [m, n] -= a [m, k] b [k, n], with a by strides, one of which is 1, and b by rows; m is
// kRowsAtMost at most. The sums of kInnerOfTile products each are taken off one after the other.
void SubtractProduct(double* c, int64_t ld_c, const double* a, int64_t row_a, int64_t col_a,
                     const double* b, int64_t ld_b, int64_t m, int64_t n, int64_t k) {
  constexpr auto kStep = static_cast<int64_t>(kDoubleLanes);
  HWY_ALIGN double gathered[kRowsAtMost * kInnerOfTile];
  for (int64_t first = 0; first < k; first += kInnerOfTile) {
    const int64_t inner = HWY_MIN(kInnerOfTile, k - first);
    const LeftPart left = Gather({a + first * col_a, row_a, col_a}, m, inner, gathered);
    const double* right = b + first * ld_b;
    int64_t j = 0;
    for (; j + kVectors * kStep <= n; j += kVectors * kStep) {
      SubtractColumns<kVectors>(c + j, ld_c, left, right + j, ld_b, m, inner);
    }
    if (j + 2 * kStep <= n) {
      SubtractColumns<2>(c + j, ld_c, left, right + j, ld_b, m, inner);
      j += 2 * kStep;
    }
    if (j + kStep <= n) {
      SubtractColumns<1>(c + j, ld_c, left, right + j, ld_b, m, inner);
      j += kStep;
    }
    for (; j < n; ++j) {
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < inner; ++l) {
          sum = std::fma(left.data[i * left.row_stride + l * left.inner_stride],
                         right[l * ld_b + j], sum);
        }
        c[i * ld_c + j] -= sum;
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

HWY_EXPORT(SubtractProduct);

constexpr int64_t kBlock = HWY_NAMESPACE::kRowsAtMost;

int64_t NumBlocks(int64_t n) {
  return (n + kBlock - 1) / kBlock;
}

// The lower Cholesky factor of the block at the diagonal, in place, and its inverse [m, m].
bool FactorBlock(double* a, int64_t ld, int64_t m, std::vector<double>& inverse) {
  for (int64_t j = 0; j < m; ++j) {
    double pivot = a[j * ld + j];
    for (int64_t k = 0; k < j; ++k) pivot -= a[j * ld + k] * a[j * ld + k];
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    const double root = std::sqrt(pivot);
    a[j * ld + j] = root;
    for (int64_t i = j + 1; i < m; ++i) {
      double sum = a[i * ld + j];
      for (int64_t k = 0; k < j; ++k) sum -= a[i * ld + k] * a[j * ld + k];
      a[i * ld + j] = sum / root;
    }
  }
  inverse.assign(static_cast<size_t>(m * m), 0.0);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t i = j; i < m; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int64_t k = j; k < i; ++k) {
        sum -= a[i * ld + k] * inverse[static_cast<size_t>(k * m + j)];
      }
      inverse[static_cast<size_t>(i * m + j)] = sum / a[i * ld + i];
    }
  }
  return true;
}

int64_t BlockSize(int64_t n, int64_t block) {
  return std::min(kBlock, n - block * kBlock);
}

template <class... Arguments>
void Subtract(Arguments... arguments) {
  HWY_DYNAMIC_DISPATCH(SubtractProduct)(arguments...);
}

// a = L L^T is factored in its lower triangle; x [n, n] becomes L^-1, zeros above its diagonal.
bool InverseOfFactor(double* a, int64_t n, std::vector<double>& x, ThreadPool& pool) {
  const auto subtract = [](auto... arguments) { Subtract(arguments...); };
  const int64_t blocks = NumBlocks(n);
  const auto size = [&](int64_t block) { return BlockSize(n, block); };
  std::vector<std::vector<double>> diagonal(static_cast<size_t>(blocks));  // inverses of L_JJ
  // a = L L^T, L in the lower triangle.
  std::vector<double> panel_transposed;
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t first = j * kBlock, m = size(j), below = n - first - m;
    std::vector<double>& inverse = diagonal[static_cast<size_t>(j)];
    if (!FactorBlock(a + first * n + first, n, m, inverse)) return false;
    if (below == 0) break;
    // L_IJ = A_IJ L_JJ^-T, and its transpose beside it for the update of what is right of it.
    panel_transposed.assign(static_cast<size_t>(m * below), 0.0);
    pool.Run(blocks - j - 1, [&](int64_t task, int) {
      const int64_t block = j + 1 + task, rows = size(block);
      double* panel = a + block * kBlock * n + first;
      std::vector<double> solved(static_cast<size_t>(rows * m));
      std::vector<double> transposed(static_cast<size_t>(m * m));
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c < m; ++c) {
          transposed[static_cast<size_t>(c * m + r)] = -inverse[static_cast<size_t>(r * m + c)];
        }
      }
      subtract(solved.data(), m, panel, n, 1, transposed.data(), m, rows, m, m);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < m; ++c) {
          const double value = solved[static_cast<size_t>(r * m + c)];
          panel[r * n + c] = value;
          panel_transposed[static_cast<size_t>(c * below + (block - j - 1) * kBlock + r)] = value;
        }
      }
    });
    pool.Run(blocks - j - 1, [&](int64_t task, int) {
      const int64_t block = j + 1 + task, rows = size(block);
      // The lower triangle of the rest: columns up to the block's own.
      const int64_t columns = (block - j - 1) * kBlock + rows;
      subtract(a + block * kBlock * n + first + m, n, a + block * kBlock * n + first, n, 1,
               panel_transposed.data(), below, rows, columns, m);
    });
  }
  // X = L^-1 by columns of blocks.
  x.assign(static_cast<size_t>(n * n), 0.0);
  pool.Run(blocks, [&](int64_t j, int) {
    const int64_t columns = size(j);
    for (int64_t i = j; i < blocks; ++i) {
      const std::vector<double>& inverse = diagonal[static_cast<size_t>(i)];
      const int64_t rows = size(i);
      double* out = x.data() + i * kBlock * n + j * kBlock;
      if (i == j) {
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(inverse.data() + r * rows, rows, out + r * n);
        }
        continue;
      }
      // - L_II^-1 sum_K L_IK X_KJ
      std::vector<double> sum(static_cast<size_t>(rows * columns), 0.0);
      const int64_t inner = (i - j) * kBlock;
      subtract(sum.data(), columns, a + i * kBlock * n + j * kBlock, n, 1,
               x.data() + j * kBlock * n + j * kBlock, n, rows, columns, inner);
      for (double& value : sum) value = -value;
      subtract(out, n, inverse.data(), rows, 1, sum.data(), columns, rows, columns, rows);
    }
  });
  return true;
}

}  // namespace

bool InverseCholeskyFactor(double* a, int64_t n, ThreadPool& pool) {
  std::vector<double> x;
  if (!InverseOfFactor(a, n, x, pool)) return false;
  std::copy(x.begin(), x.end(), a);
  return true;
}

bool InvertPositiveDefinite(double* a, int64_t n, ThreadPool& pool) {
  std::vector<double> x;
  if (!InverseOfFactor(a, n, x, pool)) return false;
  // a^-1 = X^T X: row block i needs the rows of X from i on.
  pool.Run(NumBlocks(n), [&](int64_t i, int) {
    const int64_t rows = BlockSize(n, i), first = i * kBlock, columns = first + rows;
    std::vector<double> sum(static_cast<size_t>(rows * columns), 0.0);
    Subtract(sum.data(), columns, x.data() + first * n + first, 1, n, x.data() + first * n, n, rows,
             columns, n - first);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        a[(first + r) * n + c] = -sum[static_cast<size_t>(r * columns + c)];
      }
    }
  });
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = r + 1; c < n; ++c) a[r * n + c] = a[c * n + r];
  }
  return true;
}

bool InvertPositiveDefiniteReference(double* a, int64_t n) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = r + 1; c < n; ++c) a[r * n + c] = a[c * n + r];
  }
  for (int64_t p = 0; p < n; ++p) {
    const double pivot = a[p * n + p];
    if (!(pivot > 0)) return false;
    a[p * n + p] = 1;
    for (int64_t c = 0; c < n; ++c) a[p * n + c] /= pivot;
    for (int64_t r = 0; r < n; ++r) {
      if (r == p) continue;
      const double factor = a[r * n + p];
      a[r * n + p] = 0;
      for (int64_t c = 0; c < n; ++c) a[r * n + c] -= factor * a[p * n + c];
    }
  }
  return true;
}

}  // namespace winnow
#endif  // HWY_ONCE
