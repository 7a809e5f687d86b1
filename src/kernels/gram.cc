// Gram matrices of expert outputs: dot products of all pairs, upper triangle only.
//
// Pairs are computed in register tiles: 4 vectors against up to 3 later ones, and triangles of 4 on
// the diagonal. n is cut into blocks so that a tile's vectors stay in L1. Every pair is summed the
// same way whatever tile it is in: per block one vector of partial sums, then its lanes; blocks in
// order.
#include <algorithm>

#include "kernels/elementwise.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gram.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

inline constexpr size_t kGramRows = 4;

// Where the pair (i, i) is in the upper triangle stored row by row.
HWY_INLINE int64_t DiagonalIndex(int64_t m, int64_t i) {
  return i * m - i * (i - 1) / 2;
}

// Writes or adds kCount sums of lanes.
template <size_t kCount>
HWY_INLINE void LaneSums(const VF* v, float* sums) {
  static_assert(kCount % 4 == 0);
  HWY_UNROLL(4)
  for (size_t i = 0; i < kCount; i += 4) {
    const VF four[4] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
    SumLanesOfFour(four, sums + i);
  }
}

// Pairs (i + a, j + b), a < 4, b < kColumns, all of them above the diagonal.
template <size_t kColumns>
HWY_INLINE void PairTile(const float* fi, const float* fj, size_t n, int64_t ld,
                         float (&sums)[kGramRows * kColumns]) {
  const DF d;
  VF v[kGramRows * kColumns];
  HWY_UNROLL(12)
  for (VF& sum : v) sum = hn::Zero(d);
  const auto step = [&](const auto& load) HWY_ATTR {
    VF right[kColumns];
    HWY_UNROLL(3)
    for (size_t b = 0; b < kColumns; ++b) right[b] = load(fj + static_cast<int64_t>(b) * ld);
    HWY_UNROLL(4)
    for (size_t a = 0; a < kGramRows; ++a) {
      const VF left = load(fi + static_cast<int64_t>(a) * ld);
      HWY_UNROLL(3)
      for (size_t b = 0; b < kColumns; ++b) {
        v[b * kGramRows + a] = hn::MulAdd(left, right[b], v[b * kGramRows + a]);
      }
    }
  };
  size_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    step([&](const float* row) HWY_ATTR { return hn::LoadU(d, row + k); });
  }
  if (k < n) step([&](const float* row) HWY_ATTR { return LoadPartial(row + k, n - k); });
  LaneSums<kGramRows * kColumns>(v, sums);
}

// Pairs (i + a, i + b), a <= b < kRows; sums in the order (0,0) (0,1) .. (1,1) ..
template <size_t kRows>
HWY_INLINE void Triangle(const float* f, size_t n, int64_t ld, float (&sums)[12]) {
  const DF d;
  VF v[12];  // 10 at most; whole groups of 4 are summed
  HWY_UNROLL(12)
  for (VF& sum : v) sum = hn::Zero(d);
  const auto step = [&](const auto& load) HWY_ATTR {
    VF row[kRows];
    HWY_UNROLL(4)
    for (size_t a = 0; a < kRows; ++a) row[a] = load(f + static_cast<int64_t>(a) * ld);
    size_t pair = 0;
    HWY_UNROLL(4)
    for (size_t a = 0; a < kRows; ++a) {
      HWY_UNROLL(4)
      for (size_t b = a; b < kRows; ++b, ++pair) v[pair] = hn::MulAdd(row[a], row[b], v[pair]);
    }
  };
  size_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    step([&](const float* row) HWY_ATTR { return hn::LoadU(d, row + k); });
  }
  if (k < n) step([&](const float* row) HWY_ATTR { return LoadPartial(row + k, n - k); });
  LaneSums<12>(v, sums);
}

template <size_t kColumns>
HWY_NOINLINE void GramColumns(const float* f, int64_t m, int64_t i, int64_t j, size_t n, int64_t ld,
                              float* gram) {
  float sums[kGramRows * kColumns];
  PairTile<kColumns>(f + i * ld, f + j * ld, n, ld, sums);
  for (int64_t a = 0; a < static_cast<int64_t>(kGramRows); ++a) {
    float* to = gram + DiagonalIndex(m, i + a) + (j - i - a);
    for (size_t b = 0; b < kColumns; ++b) to[b] += sums[b * kGramRows + static_cast<size_t>(a)];
  }
}

template <size_t kRows>
HWY_NOINLINE void GramDiagonal(const float* f, int64_t m, int64_t i, size_t n, int64_t ld,
                               float* gram) {
  float sums[12];
  Triangle<kRows>(f + i * ld, n, ld, sums);
  size_t pair = 0;
  for (size_t a = 0; a < kRows; ++a) {
    float* to = gram + DiagonalIndex(m, i + static_cast<int64_t>(a));
    for (size_t b = a; b < kRows; ++b, ++pair) to[b - a] += sums[pair];
  }
}

// Adds one block of n to all pairs.
void GramBlock(const float* f, int64_t m, size_t n, int64_t ld, float* gram) {
  constexpr auto kRows = static_cast<int64_t>(kGramRows);
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    GramDiagonal<4>(f, m, i, n, ld, gram);
    for (int64_t j = i + kRows; j < m;) {
      const int64_t left = m - j;
      if (left == 1) {
        GramColumns<1>(f, m, i, j, n, ld, gram);
        j += 1;
      } else if (left == 2 || left == 4) {  // 2 + 2 keeps both FMA units busy, 3 + 1 would not
        GramColumns<2>(f, m, i, j, n, ld, gram);
        j += 2;
      } else {
        GramColumns<3>(f, m, i, j, n, ld, gram);
        j += 3;
      }
    }
  }
  switch (m - i) {
    case 1:
      return GramDiagonal<1>(f, m, i, n, ld, gram);
    case 2:
      return GramDiagonal<2>(f, m, i, n, ld, gram);
    case 3:
      return GramDiagonal<3>(f, m, i, n, ld, gram);
    default:
      return;
  }
}

void GramUpperTarget(const float* f, int64_t m, int64_t n, int64_t ld, float* gram) {
  constexpr int64_t kBlock = 512;  // 7 vectors of a tile: 14 KiB of L1
  std::fill_n(gram, m * (m + 1) / 2, 0.0f);
  for (int64_t first = 0; first < n; first += kBlock) {
    const auto block = static_cast<size_t>(std::min(kBlock, n - first));
    GramBlock(f + first, m, block, ld, gram);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(GramUpperTarget);

void GramUpper(const float* f, int64_t m, int64_t n, int64_t ld, float* gram) {
  HWY_DYNAMIC_DISPATCH(GramUpperTarget)(f, m, n, ld, gram);
}

}  // namespace winnow
#endif  // HWY_ONCE
