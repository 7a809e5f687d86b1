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
#include "kernels/tile_shape.h"     // kBlockColumns
#include "kernels/weight_matrix.h"  // WeightMatrix
#include "kernels/widen_packed-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

// out [columns][kTileColumns] = the rows, widened and transposed.
template <Dtype kDtype>
HWY_INLINE void WidenRows(const std::byte* const* rows, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c) {
    for (size_t r = 0; r < kTileColumns; ++r) {
      *out++ = LoadAsFloat(kDtype, rows[r], static_cast<size_t>(c));
    }
  }
}

// out [(columns + 1) / 2][kTileColumns] = the rows of bf16, transposed two columns at a time.
HWY_INLINE void PairRows(const std::byte* const* rows, int64_t columns, uint32_t* out) {
  for (int64_t c = 0; c < columns; c += 2) {
    for (size_t r = 0; r < kTileColumns; ++r, ++out) {
      *out = 0;
      std::memcpy(out, rows[r] + 2 * c, c + 1 < columns ? 4 : 2);
    }
  }
}

#else

// A vector of 16-byte blocks, `stride` bytes apart in memory.
template <class D>
HWY_INLINE hn::Vec<D> LoadBlocks(D d, const std::byte* from, size_t stride) {
  using T = hn::TFromD<D>;
  constexpr size_t kBlocks = hn::MaxLanes(D()) * sizeof(T) / 16;
  if constexpr (kBlocks == 1) {
    return hn::LoadU(d, As<T>(from));
  } else {
    const hn::Half<D> half;
    return hn::Combine(d, LoadBlocks(half, from + kBlocks / 2 * stride, stride),
                       LoadBlocks(half, from, stride));
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

// f32: transpositions of 4x4, a half of the tile at a time; block b of a vector holds rows
// 4b..4b+3. `rows` [kTileColumns] with a constant stride; writes whole groups of 4 columns.
HWY_INLINE void TransposeF32(const std::byte* rows, size_t stride, size_t columns, float* out) {
  const DF d;
  for (size_t c = 0; c < columns; c += 4) {
    HWY_UNROLL(2)
    for (size_t half = 0; half < 2; ++half) {
      VF v[4];
      HWY_UNROLL(4)
      for (size_t r = 0; r < 4; ++r) {
        v[r] = LoadBlocks(d, rows + (half * kLanes + r) * stride + c * 4, 4 * stride);
      }
      Shuffle(d, v);
      Shuffle(d, v);
      HWY_UNROLL(4)
      for (size_t r = 0; r < 4; ++r) {
        hn::Store(v[r], d, out + (c + r) * kTileColumns + half * kLanes);
      }
    }
  }
}

// bf16 and f16: transpositions of 8x8 in 16-bit lanes, then widening. bf16 is widened by
// interleaving with zeros inside blocks, so block b must hold rows 4b..4b+3 of both halves of the
// tile. f16 is widened by an instruction that takes half a vector in order, so block b holds rows
// 8b..8b+7. Writes whole groups of 8 columns.
template <Dtype kDtype>
HWY_INLINE void Transpose16(const std::byte* rows, size_t stride, size_t columns, float* out) {
  const DF d;
  const hn::Repartition<uint16_t, DF> d16;
  using V16 = hn::Vec<decltype(d16)>;
  constexpr bool kIsF16 = kDtype == Dtype::kF16;
  for (size_t c = 0; c < columns; c += 8) {
    V16 v[8];
    HWY_UNROLL(8)
    for (size_t r = 0; r < 8; ++r) {
      const size_t row = kIsF16 ? r : r % 4 + r / 4 * kLanes;
      v[r] = LoadBlocks(d16, rows + row * stride + c * 2, (kIsF16 ? 8 : 4) * stride);
    }
    Shuffle(d16, v);
    Shuffle(d16, v);
    Shuffle(d16, v);
    HWY_UNROLL(8)
    for (size_t r = 0; r < 8; ++r) {
      float* to = out + (c + r) * kTileColumns;
      if constexpr (kIsF16) {
        const hn::Half<decltype(d16)> half16;
        const hn::Rebind<hwy::float16_t, DF> df16;
        const auto lower = hn::BitCast(df16, hn::LowerHalf(half16, v[r]));
        const auto upper = hn::BitCast(df16, hn::UpperHalf(half16, v[r]));
        hn::Store(hn::PromoteTo(d, lower), d, to);
        hn::Store(hn::PromoteTo(d, upper), d, to + kLanes);
      } else {
        const V16 zero = hn::Zero(d16);
        hn::Store(hn::BitCast(d, hn::InterleaveLower(d16, zero, v[r])), d, to);
        hn::Store(hn::BitCast(d, hn::InterleaveUpper(d16, zero, v[r])), d, to + kLanes);
      }
    }
  }
}

// Bytes between staged rows: consecutive rows in different sets of the L1 cache.
template <size_t kElement>
inline constexpr size_t kStagedStride = kBlockColumns* kElement + 64;

// Copies the rows side by side: rows of a power-of-two length all fall into one set of the L1 cache
// and would push each other out between two groups of columns. Zeros after each row up to a whole
// vector make room to read whole groups of columns at its end.
template <size_t kElement>
HWY_INLINE void StageRows(const std::byte* const* rows, int64_t columns, std::byte* staged) {
  const size_t bytes = static_cast<size_t>(columns) * kElement;
  const hn::Repartition<uint8_t, DF> d8;
  for (size_t r = 0; r < kTileColumns; ++r) {
    const auto* from = As<uint8_t>(rows[r]);
    auto* to = static_cast<uint8_t*>(static_cast<void*>(staged + r * kStagedStride<kElement>));
    size_t i = 0;
    for (; i + HWY_MAX_BYTES <= bytes; i += HWY_MAX_BYTES) {
      hn::Store(hn::LoadU(d8, from + i), d8, to + i);
    }
    if (i < bytes) {
      hn::Store(hn::Zero(d8), d8, to + i);
      std::memcpy(to + i, from + i, bytes - i);
    }
  }
}

// out [columns][kTileColumns] = the rows, widened and transposed, and up to 7 columns more
// (kBlockColumns is a multiple of 8).
template <Dtype kDtype>
HWY_INLINE void WidenRows(const std::byte* const* rows, int64_t columns, float* out) {
  constexpr size_t kElement = kElementBytes<kDtype>;
  constexpr size_t kStride = kStagedStride<kElement>;
  HWY_ALIGN std::byte staged[kTileColumns * kStride];
  StageRows<kElement>(rows, columns, staged);
  if constexpr (kDtype == Dtype::kF32) {
    TransposeF32(staged, kStride, static_cast<size_t>(columns), out);
  } else {
    Transpose16<kDtype>(staged, kStride, static_cast<size_t>(columns), out);
  }
}

// out [(columns + 1) / 2][kTileColumns] = the rows of bf16, transposed two columns at a time (up to
// 3 pairs more are written): moves 32 bits, as a transposition of f32 does.
HWY_INLINE void PairRows(const std::byte* const* rows, int64_t columns, uint32_t* out) {
  constexpr size_t kStride = kStagedStride<2>;
  HWY_ALIGN std::byte staged[kTileColumns * kStride];
  StageRows<2>(rows, columns, staged);
  const auto pairs = static_cast<size_t>((columns + 1) / 2);
  TransposeF32(staged, kStride, pairs, static_cast<float*>(static_cast<void*>(out)));
}

#endif  // HWY_TARGET == HWY_SCALAR

template <Dtype kDtype>
HWY_NOINLINE void WidenTileAs(const std::byte* const* rows, int64_t columns, float* out) {
  WidenRows<kDtype>(rows, columns, out);
}

// rows[r] = where W's row first_row + r has its column first_column; past the end of W the last
// row.
HWY_INLINE void TileRowPointers(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                                const std::byte* (&rows)[kTileColumns]) {
  const int64_t element_bytes = w.dtype == Dtype::kF32 ? 4 : 2;
  for (size_t r = 0; r < kTileColumns; ++r) {
    const int64_t row = std::min(first_row + static_cast<int64_t>(r), w.rows - 1);
    rows[r] = w.data + (row * w.stride() + first_column) * element_bytes;
  }
}

// out [kBlockColumns][kTileColumns]: its first `columns` rows = W rows [first_row, first_row +
// kTileColumns), columns [first_column, first_column + columns).
HWY_INLINE void WidenTile(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                          int64_t columns, float* out) {
  if (!w.packed.empty()) return WidenPackedTile(w, first_row, first_column, columns, out);
  const std::byte* rows[kTileColumns];
  TileRowPointers(w, first_row, first_column, rows);
  if (w.dtype == Dtype::kF32) {
    WidenTileAs<Dtype::kF32>(rows, columns, out);
  } else if (w.dtype == Dtype::kBF16) {
    WidenTileAs<Dtype::kBF16>(rows, columns, out);
  } else {
    WidenTileAs<Dtype::kF16>(rows, columns, out);
  }
}

// out [rows][kTileColumns] = W rows [first_row, first_row + rows), columns [first_column,
// first_column + kTileColumns), zeros past W's last: what a product with W itself, not its
// transpose, reads. The rows of the next columns are asked for meanwhile.
template <Dtype kDtype>
HWY_NOINLINE void WidenPlainTileAs(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                                   int64_t rows, float* out) {
  constexpr auto kElement = static_cast<int64_t>(kElementBytes<kDtype>);
  const DF d;
  const int64_t columns = std::min(static_cast<int64_t>(kTileColumns), w.cols - first_column);
  const int64_t row_bytes = w.stride() * kElement;
  const std::byte* from = w.data + first_row * row_bytes + first_column * kElement;
  for (int64_t r = 0; r < rows; ++r, from += row_bytes, out += kTileColumns) {
    if (columns == static_cast<int64_t>(kTileColumns)) {
      __builtin_prefetch(from + static_cast<int64_t>(kTileColumns) * kElement, 0, 2);
      hn::Store(Widen<kDtype>(from), d, out);
      hn::Store(Widen<kDtype>(from + static_cast<int64_t>(kLanes) * kElement), d, out + kLanes);
      continue;
    }
    const auto left = static_cast<size_t>(columns);
    hn::Store(left >= kLanes ? Widen<kDtype>(from) : WidenPartial<kDtype>(from, left), d, out);
    const std::byte* second = from + static_cast<int64_t>(kLanes) * kElement;
    hn::Store(left > kLanes ? WidenPartial<kDtype>(second, left - kLanes) : hn::Zero(d), d,
              out + kLanes);
  }
}

HWY_INLINE void WidenPlainTile(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                               int64_t rows, float* out) {
  if (!w.packed.empty()) return WidenPackedPlainTile(w, first_row, first_column, rows, out);
  if (w.dtype == Dtype::kF32) {
    WidenPlainTileAs<Dtype::kF32>(w, first_row, first_column, rows, out);
  } else if (w.dtype == Dtype::kBF16) {
    WidenPlainTileAs<Dtype::kBF16>(w, first_row, first_column, rows, out);
  } else {
    WidenPlainTileAs<Dtype::kF16>(w, first_row, first_column, rows, out);
  }
}

// WidenTile of a bf16 or packed weight in pairs of columns: out [kBlockColumns / 2][kTileColumns].
HWY_INLINE void PairTile(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                         int64_t columns, uint32_t* out) {
#if HWY_TARGET != HWY_SCALAR
  if (!w.packed.empty()) return PairPackedTile(w, first_row, first_column, columns, out);
#endif
  const std::byte* rows[kTileColumns];
  TileRowPointers(w, first_row, first_column, rows);
  PairRows(rows, columns, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_WIDEN_TILE_INL_H_
