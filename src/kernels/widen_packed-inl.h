// Packed weights as tiles of f32: their blocks hold 16 rows side by side, as a tile wants them, so
// nothing is transposed. Included once per target by foreach_target.h, hence the toggled guard.
#if defined(WINNOW_KERNELS_WIDEN_PACKED_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WINNOW_KERNELS_WIDEN_PACKED_INL_H_
#undef WINNOW_KERNELS_WIDEN_PACKED_INL_H_
#else
#define WINNOW_KERNELS_WIDEN_PACKED_INL_H_
#endif

#include <algorithm>

#include "kernels/packed_codes-inl.h"
#include "kernels/packed_instances.h"  // PackedLayout, WithFormat
#include "kernels/simd-inl.h"
#include "kernels/weight_matrix.h"  // WeightMatrix

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

HWY_INLINE void WidenPackedTile(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                                int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < static_cast<int64_t>(kTileColumns); ++r) {
      *out++ = first_row + r < w.rows
                   ? LoadPackedValue(w.packed, w.cols, first_row + r, first_column + c, w.data)
                   : 0.0f;
    }
  }
}

HWY_INLINE void WidenPackedPlainTile(const WeightMatrix& w, int64_t first_row, int64_t first_column,
                                     int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < static_cast<int64_t>(kTileColumns); ++c) {
      *out++ = first_column + c < w.cols
                   ? LoadPackedValue(w.packed, w.cols, first_row + r, first_column + c, w.data)
                   : 0.0f;
    }
  }
}

#else

// What codes of a group become: (code as a number - zero) * scale + minimum, rounded once as in
// LoadPackedValue.
struct ChunkScale {
  VF zero, scale, minimum;
  bool with_minima;
};

// Four columns of kLanes rows to out [4][ld].
HWY_INLINE void WidenVector(VU codes, const ChunkScale& how, float* out, int64_t ld) {
  const DF d;
  const DI di;
  const VU byte = hn::Set(DU(), 0xffu);
  HWY_UNROLL(4)
  for (int c = 0; c < 4; ++c) {
    const VI level = hn::BitCast(di, hn::And(codes, byte));
    const VF number = hn::Sub(hn::ConvertTo(d, level), how.zero);
    const VF value =
        how.with_minima ? hn::MulAdd(number, how.scale, how.minimum) : hn::Mul(number, how.scale);
    hn::Store(value, d, out + c * ld);
    codes = hn::ShiftRight<8>(codes);
  }
}

template <int kBits, bool kLevels, int kV = 0>
HWY_INLINE void WidenVectors(const std::byte* chunk, hn::Vec<hn::Repartition<uint8_t, DF> > levels,
                             const ChunkScale& how, float* out, int64_t ld) {
  VU codes = Codes<kBits, kV>(chunk);
  if constexpr (kLevels) {
    const hn::Repartition<uint8_t, DF> d8;
    codes = hn::BitCast(DU(), hn::TableLookupBytes(levels, hn::BitCast(d8, codes)));
  }
  WidenVector(codes, how, out + 4 * kV * ld, ld);
  if constexpr (kV < 7) WidenVectors<kBits, kLevels, kV + 1>(chunk, levels, how, out, ld);
}

// Rows lane.. of a block, kLanes of them, one chunk: out [32][ld]. Out of line: one instance a
// format, whatever reads it.
template <int kBits, bool kLevels>
HWY_NOINLINE void WidenChunk(const WeightMatrix& w, int64_t block, int64_t chunk, int64_t lane,
                             float* out, int64_t ld) {
  const DF d;
  const PackedLayout layout(w);
  const std::byte* bytes = w.data + static_cast<uint64_t>(block) * layout.block_bytes;
  const int64_t group = chunk / layout.chunks_per_group;
  ChunkScale how = {.zero = hn::Set(d, static_cast<float>(layout.zero)),
                    .scale = hn::Zero(d),
                    .minimum = hn::Zero(d),
                    .with_minima = layout.with_minima};
  LoadGroups(layout, bytes + (group * kPackedRows + lane) * 2, how.scale, how.minimum);
  const std::byte* codes = bytes + layout.codes_bytes + chunk * 64 * kBits;
  WidenVectors<kBits, kLevels>(codes + 4 * lane, LevelBytes(w.packed, 128), how, out, ld);
}

HWY_INLINE void WidenChunkOf(const WeightMatrix& w, int64_t block, int64_t chunk, int64_t lane,
                             float* out, int64_t ld) {
  WithFormat(w.packed, [&]<int kBits, bool kLevels>() {
    WidenChunk<kBits, kLevels>(w, block, chunk, lane, out, ld);
  });
}

// What WidenTile makes, for whole chunks: up to 31 columns more are written; zeros past W's last
// block.
HWY_NOINLINE inline void WidenPackedTile(const WeightMatrix& w, int64_t first_row,
                                         int64_t first_column, int64_t columns, float* out) {
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  const int64_t chunks = (columns + kPackedChunkColumns - 1) / kPackedChunkColumns;
  const int64_t blocks = (w.rows + kPackedRows - 1) / kPackedRows;
  for (int64_t at = 0; at < kColumns; at += static_cast<int64_t>(kLanes)) {
    const int64_t block = (first_row + at) / kPackedRows, lane = (first_row + at) % kPackedRows;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float* to = out + chunk * kPackedChunkColumns * kColumns + at;
      if (block < blocks) {
        WidenChunkOf(w, block, first_column / kPackedChunkColumns + chunk, lane, to, kColumns);
      } else {
        for (int64_t c = 0; c < kPackedChunkColumns; ++c) {
          hn::Store(hn::Zero(DF()), DF(), to + c * kColumns);
        }
      }
    }
  }
}

// The same rounded to bf16, to nearest even, two columns in one unit as PairTile makes them: a
// chunk at a time, so that f32 values stay in L1.
HWY_NOINLINE inline void PairPackedTile(const WeightMatrix& w, int64_t first_row,
                                        int64_t first_column, int64_t columns, uint32_t* out) {
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  const DU d;
  HWY_ALIGN float values[kPackedChunkColumns * kColumns];
  const auto rounded = [&](const float* from) HWY_ATTR {
    const VU bits = hn::BitCast(d, hn::Load(DF(), from));
    const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d, 1u));
    return hn::Add(bits, hn::Add(odd, hn::Set(d, 0x7fffu)));
  };
  for (int64_t first = 0; first < columns; first += kPackedChunkColumns) {
    WidenPackedTile(w, first_row, first_column + first, kPackedChunkColumns, values);
    for (int64_t c = 0; c < kPackedChunkColumns; c += 2, out += kColumns) {
      for (int64_t at = 0; at < kColumns; at += kStep) {
        const VU low = hn::ShiftRight<16>(rounded(values + c * kColumns + at));
        const VU high = hn::And(rounded(values + (c + 1) * kColumns + at), hn::Set(d, 0xffff0000u));
        hn::Store(hn::Or(low, high), d, out + at);
      }
    }
  }
}

// What WidenPlainTile makes: rows side by side are taken apart through a chunk in memory.
HWY_NOINLINE inline void WidenPackedPlainTile(const WeightMatrix& w, int64_t first_row,
                                              int64_t first_column, int64_t rows, float* out) {
  constexpr auto kColumns = static_cast<int64_t>(kTileColumns);
  HWY_ALIGN float values[kPackedChunkColumns * kPackedRows];
  const int64_t chunk = first_column / kPackedChunkColumns;
  const int64_t skipped = first_column % kPackedChunkColumns;
  const int64_t columns = std::min(kColumns, w.cols - first_column);
  for (int64_t row = first_row; row < first_row + rows;) {
    const int64_t block = row / kPackedRows;
    for (int64_t lane = 0; lane < kPackedRows; lane += static_cast<int64_t>(kLanes)) {
      WidenChunkOf(w, block, chunk, lane, values + lane, kPackedRows);
    }
    const int64_t end = std::min((block + 1) * kPackedRows, first_row + rows);
    for (; row < end; ++row, out += kColumns) {
      for (int64_t c = 0; c < kColumns; ++c) {
        out[c] = c < columns ? values[(skipped + c) * kPackedRows + row % kPackedRows] : 0.0f;
      }
    }
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#endif  // WINNOW_KERNELS_WIDEN_PACKED_INL_H_
