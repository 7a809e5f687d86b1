// Widening of W: a block of stored rows to an f32 tile [columns][kTileColumns], transposed in
// registers. Included once per target by foreach_target.h, hence the toggled guard.
#if defined(WINNOW_KERNELS_WIDEN_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_WIDEN_TILE_INL_H_
#undef WINNOW_KERNELS_WIDEN_TILE_INL_H_
#else
#define WINNOW_KERNELS_WIDEN_TILE_INL_H_
#endif

#include <algorithm>

#include "kernels/simd-inl.h"
#include "kernels/weight_matrix.h"  // WeightMatrix

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// Columns [first, end) of the tile one element at a time: ends of rows, and everything on "scalar".
template <Dtype kDtype>
HWY_INLINE void WidenTileColumns(const std::byte* const* rows, int64_t first, int64_t end,
                                 float* out) {
  for (size_t r = 0; r < kTileColumns; ++r) {
    for (int64_t c = first; c < end; ++c) {
      out[static_cast<size_t>(c) * kTileColumns + r] =
          LoadAsFloat(kDtype, rows[r], static_cast<size_t>(c));
    }
  }
}

#if HWY_TARGET == HWY_SCALAR

template <Dtype kDtype>
HWY_INLINE int64_t WidenTileBlocks(const std::byte* const*, int64_t, float*) {
  return 0;
}

#else

// 16 bytes from each of the pointers, one per 128-bit block of the vector.
template <class D>
HWY_INLINE hn::Vec<D> LoadBlocks(D d, const std::byte* const* rows, size_t stride, size_t offset) {
  using T = hn::TFromD<D>;
  if constexpr (hn::MaxLanes(D()) * sizeof(T) == 16) {
    return hn::LoadU(d, As<T>(rows[0] + offset));
  } else {
    const hn::Half<D> half;
    constexpr size_t kHalfBlocks = hn::MaxLanes(D()) * sizeof(T) / 32;
    return hn::Combine(d, LoadBlocks(half, rows + kHalfBlocks * stride, stride, offset),
                       LoadBlocks(half, rows, stride, offset));
  }
}

// One step of a transposition by perfect shuffles: kCount vectors of kCount lanes per block need
// log2(kCount) of them.
template <size_t kCount, class D, class V>
HWY_INLINE void Shuffle(D d, V (&v)[kCount]) {
  V out[kCount];
  HWY_UNROLL(8)
  for (size_t i = 0; i < kCount / 2; ++i) {
    out[2 * i] = hn::InterleaveLower(d, v[i], v[i + kCount / 2]);
    out[2 * i + 1] = hn::InterleaveUpper(d, v[i], v[i + kCount / 2]);
  }
  HWY_UNROLL(8)
  for (size_t i = 0; i < kCount; ++i) v[i] = out[i];
}

// Whole groups of 4 (f32) or 8 (bf16, f16) columns; returns how many columns are done.
template <Dtype kDtype>
HWY_INLINE int64_t WidenTileBlocks(const std::byte* const* rows, int64_t columns, float* out) {
  const DF d;
  constexpr size_t kBlocks = kLanes / 4;  // 128-bit blocks of a vector
  if constexpr (kDtype == Dtype::kF32) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const size_t offset = static_cast<size_t>(c) * 4;
      HWY_UNROLL(2)
      for (size_t half = 0; half < 2; ++half) {
        VF v[4];
        HWY_UNROLL(4)
        for (size_t r = 0; r < 4; ++r) {
          v[r] = LoadBlocks(d, rows + half * kLanes + r, 4, offset);
        }
        Shuffle(d, v);
        Shuffle(d, v);
        HWY_UNROLL(4)
        for (size_t r = 0; r < 4; ++r) {
          hn::Store(v[r], d, out + (static_cast<size_t>(c) + r) * kTileColumns + half * kLanes);
        }
      }
    }
    return c;
  } else {
    // 8x8 transpositions of 16-bit lanes, one per block.
    const hn::Repartition<uint16_t, DF> d16;
    using V16 = hn::Vec<decltype(d16)>;
    // bf16 is widened by interleaving with zeros inside blocks, so block b holds W's rows
    // 4b..4b+3 of both halves of the tile. f16 is widened by an instruction that takes a half
    // vector in order, so block b holds rows 8b..8b+7.
    const std::byte* ordered[kTileColumns];
    for (size_t b = 0; b < kBlocks; ++b) {
      for (size_t r = 0; r < 8; ++r) {
        const size_t row = kDtype == Dtype::kF16 ? 8 * b + r : 4 * b + r % 4 + r / 4 * kLanes;
        ordered[8 * b + r] = rows[row];
      }
    }
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) {
      V16 v[8];
      HWY_UNROLL(8)
      for (size_t r = 0; r < 8; ++r) {
        v[r] = LoadBlocks(d16, ordered + r, 8, static_cast<size_t>(c) * 2);
      }
      Shuffle(d16, v);
      Shuffle(d16, v);
      Shuffle(d16, v);
      HWY_UNROLL(8)
      for (size_t r = 0; r < 8; ++r) {
        float* to = out + (static_cast<size_t>(c) + r) * kTileColumns;
        if constexpr (kDtype == Dtype::kBF16) {
          const V16 zero = hn::Zero(d16);
          hn::Store(hn::BitCast(d, hn::InterleaveLower(d16, zero, v[r])), d, to);
          hn::Store(hn::BitCast(d, hn::InterleaveUpper(d16, zero, v[r])), d, to + kLanes);
        } else {
          const hn::Half<decltype(d16)> half16;
          const hn::Rebind<hwy::float16_t, DF> df16;
          const auto lower = hn::BitCast(df16, hn::LowerHalf(half16, v[r]));
          const auto upper = hn::BitCast(df16, hn::UpperHalf(half16, v[r]));
          hn::Store(hn::PromoteTo(d, lower), d, to);
          hn::Store(hn::PromoteTo(d, upper), d, to + kLanes);
        }
      }
    }
    return c;
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

template <Dtype kDtype>
HWY_NOINLINE void WidenTileAs(const std::byte* const* rows, int64_t columns, float* out) {
  const int64_t done = WidenTileBlocks<kDtype>(rows, columns, out);
  WidenTileColumns<kDtype>(rows, done, columns, out);
}

// out [columns][kTileColumns] = W rows [first_row, first_row + kTileColumns), columns
// [first_column, first_column + columns). Rows past the end of W repeat the last one.
HWY_INLINE void WidenTile(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                          int64_t columns, float* out) {
  const std::byte* rows[kTileColumns];
  const int64_t element_bytes = w.dtype == Dtype::kF32 ? 4 : 2;
  for (size_t r = 0; r < kTileColumns; ++r) {
    const int64_t row = std::min(first_row + static_cast<int64_t>(r), w.rows - 1);
    rows[r] = w.data + (row * w.cols + first_column) * element_bytes;
  }
  if (w.dtype == Dtype::kF32) {
    WidenTileAs<Dtype::kF32>(rows, columns, out);
  } else if (w.dtype == Dtype::kBF16) {
    WidenTileAs<Dtype::kBF16>(rows, columns, out);
  } else {
    WidenTileAs<Dtype::kF16>(rows, columns, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_WIDEN_TILE_INL_H_
