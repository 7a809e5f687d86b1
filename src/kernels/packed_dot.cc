#include "kernels/packed_dot.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/packed_instances.h"  // PackedLayout, WithFormat
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/packed_dot.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/packed_codes-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

inline constexpr auto kChunk = static_cast<size_t>(kPackedChunkColumns);
inline constexpr int64_t kStride = DigitBytes(DigitForm::kPairsAndBytes);
inline constexpr int64_t kBytesAt = 64;  // after the pairs

#if HWY_TARGET == HWY_SCALAR

void PackedDot(const PackedDotTask& task) {
  const WeightMatrix& w = *task.w;
  const PackedLayout layout(w);
  for (int64_t row = task.first_block * kPackedRows;
       row < std::min(w.rows, task.end_block * kPackedRows); ++row) {
    const std::byte* block = w.data + static_cast<uint64_t>(row / kPackedRows) * layout.block_bytes;
    for (int64_t i = 0; i < task.rows; ++i) {
      float y = 0;
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
        const int64_t at = chunk * task.rows + i;
        int32_t sum = 0;
        for (int64_t c = 0; c < kPackedChunkColumns; ++c) {
          const int64_t col = chunk * kPackedChunkColumns + c;
          if (col >= w.cols) break;
          const uint8_t code = LoadPackedCode(w.packed, w.cols, row, col, w.data);
          const int32_t level =
              HasLevels(w.packed) ? GridLevels(w.packed)[code] : int32_t{code} - layout.zero;
          // Pairs (0, 2), (1, 3) of four.
          const int64_t place = c / 4 * 4 + (c % 4 == 1 ? 2 : c % 4 == 2 ? 1 : c % 4);
          int16_t q = 0;
          std::memcpy(&q, task.digits + at * kStride + 2 * place, 2);
          sum += level * q;
        }
        const GroupValues group = LoadPackedGroup(w.packed, w.cols, row % kPackedRows,
                                                  chunk / layout.chunks_per_group, block);
        y += static_cast<float>(sum) * (group.scale * task.scales[at]);
        if (layout.with_minima) {
          y += group.minimum * task.scales[at] * static_cast<float>(task.sums[at]);
        }
      }
      task.y[i * task.ld_y + row] = y;
    }
  }
}

#else

// sums[r] += codes of vector kV and the ones after it, times row r's q.
template <int kBits, bool kLevels, size_t kXRows, int kV = 0>
HWY_INLINE void AddVectors(const std::byte* chunk, const std::byte* digits,
                           hn::Vec<hn::Repartition<uint8_t, DF> > levels, VI (&sums)[kXRows]) {
  const DU d;
  const hn::Repartition<int16_t, DF> d16;
  const hn::Repartition<uint8_t, DF> d8;
  VU codes = Codes<kBits, kV>(chunk);
  if constexpr (kLevels) {
    codes = hn::BitCast(d, hn::TableLookupBytes(levels, hn::BitCast(d8, codes)));
  }
  const VU low_bytes = hn::Set(d, 0x00ff00ffu);
  const auto even = hn::BitCast(d16, hn::And(codes, low_bytes));
  const auto odd = hn::BitCast(d16, hn::And(hn::ShiftRight<8>(codes), low_bytes));
  HWY_UNROLL(4)
  for (size_t r = 0; r < kXRows; ++r) {
    const auto* pairs = As<uint32_t>(digits + r * kStride + 8 * kV);
    VI unused = hn::Zero(DI());
    sums[r] = hn::ReorderWidenMulAccumulate(DI(), even, hn::BitCast(d16, hn::Set(d, pairs[0])),
                                            sums[r], unused);
    sums[r] = hn::ReorderWidenMulAccumulate(DI(), odd, hn::BitCast(d16, hn::Set(d, pairs[1])),
                                            sums[r], unused);
  }
  if constexpr (kV < 7) AddVectors<kBits, kLevels, kXRows, kV + 1>(chunk, digits, levels, sums);
}

// Bytes without sign times bytes with sign, neighbours added to 16 bits with saturation.
template <class V8, class V16 = hn::Vec<hn::Repartition<int16_t, DF> > >
HWY_INLINE V16 MulBytes(V8 codes, V8 digits) {
#if HWY_TARGET <= HWY_AVX3
  return V16{_mm512_maddubs_epi16(codes.raw, digits.raw)};
#else
  return V16{_mm256_maddubs_epi16(codes.raw, digits.raw)};
#endif
}

// The same for codes below 16, whose products with a digit stay in 16 bits over a whole chunk:
// 8 vectors of two products of at most 15 * 128 are 30,720.
template <int kBits, size_t kXRows, int kV = 0>
HWY_INLINE void AddSmallCodes(const std::byte* chunk, const std::byte* digits,
                              hn::Vec<hn::Repartition<int16_t, DF> > (&high)[kXRows],
                              hn::Vec<hn::Repartition<int16_t, DF> > (&low)[kXRows]) {
  const DU d;
  const hn::Repartition<uint8_t, DF> d8;
  const auto codes = hn::BitCast(d8, Codes<kBits, kV>(chunk));
  HWY_UNROLL(4)
  for (size_t r = 0; r < kXRows; ++r) {
    const std::byte* bytes = digits + r * kStride + kBytesAt + 4 * kV;
    const auto high_digits = hn::BitCast(d8, hn::Set(d, *As<uint32_t>(bytes)));
    const auto low_digits = hn::BitCast(d8, hn::Set(d, *As<uint32_t>(bytes + 32)));
    high[r] = hn::Add(high[r], MulBytes(codes, high_digits));
    low[r] = hn::Add(low[r], MulBytes(codes, low_digits));
  }
  if constexpr (kV < 7) AddSmallCodes<kBits, kXRows, kV + 1>(chunk, digits, high, low);
}

// sums [kXRows] of a chunk: codes, or levels + 128, times q.
template <int kBits, bool kLevels, size_t kXRows>
HWY_INLINE void SumChunk(const std::byte* chunk, const std::byte* digits,
                         hn::Vec<hn::Repartition<uint8_t, DF> > levels, VI (&sums)[kXRows]) {
  const DI d;
  if constexpr (kBits <= 4 && !kLevels) {
    const hn::Repartition<int16_t, DF> d16;
    hn::Vec<decltype(d16)> high[kXRows], low[kXRows];
    HWY_UNROLL(4)
    for (size_t r = 0; r < kXRows; ++r) high[r] = low[r] = hn::Zero(d16);
    AddSmallCodes<kBits, kXRows>(chunk, digits, high, low);
    const auto ones = hn::Set(d16, 1);
    HWY_UNROLL(4)
    for (size_t r = 0; r < kXRows; ++r) {
      VI unused = hn::Zero(d);
      const VI top = hn::ReorderWidenMulAccumulate(d, high[r], ones, hn::Zero(d), unused);
      sums[r] = hn::ReorderWidenMulAccumulate(d, low[r], ones, hn::ShiftLeft<8>(top), unused);
    }
  } else {
    HWY_UNROLL(4)
    for (VI& sum : sums) sum = hn::Zero(d);
    AddVectors<kBits, kLevels, kXRows>(chunk, digits, levels, sums);
  }
}

// kLanes rows of a block, from its row `lane`, against kXRows rows of X from `first`.
template <int kBits, bool kLevels, size_t kXRows>
HWY_INLINE void DotLanes(const PackedDotTask& task, const PackedLayout& layout, int64_t first,
                         const std::byte* block, int64_t lane, VF (&y)[kXRows]) {
  const DF d;
  const DI di;
  const std::byte* chunk = block + layout.codes_bytes + 4 * lane;
  if (lane == 0) PrefetchScales(chunk, layout.codes_bytes);
  const auto levels = LevelBytes(task.w->packed, 128);
  for (size_t r = 0; r < kXRows; ++r) y[r] = hn::Zero(d);
  for (int64_t c = 0; c < layout.chunks; ++c, chunk += 64 * kBits) {
    const int64_t at = c * task.rows + first;
    VI sums[kXRows];
    // Blocks follow each other: at the end of this one the next one's bytes are ahead.
    HWY_UNROLL(8)
    for (int i = 0; i < kBits; ++i) __builtin_prefetch(chunk + kAheadBytes + 64 * i, 0, 2);
    SumChunk<kBits, kLevels, kXRows>(chunk, task.digits + at * kStride, levels, sums);
    const std::byte* halves =
        block + (c / layout.chunks_per_group * kPackedRows + lane) * int64_t{sizeof(uint16_t)};
    VF scale, minimum;
    LoadGroups(layout, halves, scale, minimum);
    HWY_UNROLL(4)
    for (size_t r = 0; r < kXRows; ++r) {
      const VF x_scale = hn::Set(d, task.scales[at + static_cast<int64_t>(r)]);
      const int32_t x_sum = task.sums[at + static_cast<int64_t>(r)];
      const VI sum = hn::Sub(sums[r], hn::Set(di, layout.zero * x_sum));
      y[r] = hn::MulAdd(hn::ConvertTo(d, sum), hn::Mul(scale, x_scale), y[r]);
      if (layout.with_minima) {
        y[r] = hn::MulAdd(hn::Mul(minimum, x_scale), hn::Set(d, static_cast<float>(x_sum)), y[r]);
      }
    }
  }
}

template <int kBits, bool kLevels, size_t kXRows>
HWY_NOINLINE void DotBlock(const PackedDotTask& task, const PackedLayout& layout, int64_t first,
                           int64_t block) {
  const DF d;
  const std::byte* bytes = task.w->data + static_cast<uint64_t>(block) * layout.block_bytes;
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  for (int64_t lane = 0; lane < kPackedRows; lane += kStep) {
    const int64_t row = block * kPackedRows + lane;
    if (row >= task.w->rows) return;
    VF y[kXRows];
    DotLanes<kBits, kLevels, kXRows>(task, layout, first, bytes, lane, y);
    const auto left = static_cast<size_t>(task.w->rows - row);
    for (size_t r = 0; r < kXRows; ++r) {
      float* to = task.y + (first + static_cast<int64_t>(r)) * task.ld_y + row;
      left >= kLanes ? hn::StoreU(y[r], d, to) : StorePartial(y[r], to, left);
    }
  }
}

template <int kBits, bool kLevels>
void DotBlocks(const PackedDotTask& task) {
  const PackedLayout layout(*task.w);
  for (int64_t block = task.first_block; block < task.end_block; ++block) {
    int64_t first = 0;
    for (; first + 4 <= task.rows; first += 4)
      DotBlock<kBits, kLevels, 4>(task, layout, first, block);
    for (; first < task.rows; ++first) DotBlock<kBits, kLevels, 1>(task, layout, first, block);
  }
}

void PackedDot(const PackedDotTask& task) {
  WithFormat(task.w->packed, [&]<int kBits, bool kLevels>() { DotBlocks<kBits, kLevels>(task); });
}

#endif  // HWY_TARGET == HWY_SCALAR

// Whole numbers q of a chunk from x [columns], the scale and their sum.
HWY_INLINE void Quantise(const float* x, size_t columns, int32_t (&q)[kChunk], float& scale,
                         int32_t& sum) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  HWY_ALIGN float padded[kChunk] = {};
  std::memcpy(padded, x, columns * sizeof(float));
  // Magnitudes compare like the integers of their bits; those of NaN and Inf are above all others.
  const auto magnitude_bits = hn::Set(di, 0x7fffffff);
  auto largest_bits = hn::Zero(di);
  for (size_t i = 0; i < kChunk; i += kLanes) {
    const auto bits = hn::BitCast(di, hn::Load(d, padded + i));
    largest_bits = hn::Max(largest_bits, hn::And(bits, magnitude_bits));
  }
  const int32_t largest_int = hn::GetLane(hn::MaxOfLanes(di, largest_bits));
  float largest = 0;
  std::memcpy(&largest, &largest_int, sizeof(largest));
  sum = 0;
  // Below this the reciprocal overflows; such numbers add nothing.
  const bool zero = largest < 1e-30f;
  const bool finite = largest_int < 0x7f800000;
  scale = zero ? 0.0f : finite ? largest / 32512.0f : std::numeric_limits<float>::quiet_NaN();
  const auto inverse = hn::Set(d, zero || !finite ? 0.0f : 32512.0f / largest);
  if (!finite) std::fill(padded, padded + kChunk, 0.0f);
  auto sums = hn::Zero(di);
  for (size_t i = 0; i < kChunk; i += kLanes) {
    const auto whole = hn::NearestInt(hn::Mul(hn::Load(d, padded + i), inverse));
    hn::StoreU(whole, di, q + i);
    sums = hn::Add(sums, whole);
  }
  sum = hn::GetLane(hn::SumOfLanes(di, sums));
}

HWY_INLINE void StorePairs(const int32_t (&q)[kChunk], std::byte* to) {
  int16_t pairs[kChunk];
  for (size_t i = 0; i < kChunk; i += 4) {
    pairs[i] = static_cast<int16_t>(q[i]);
    pairs[i + 1] = static_cast<int16_t>(q[i + 2]);
    pairs[i + 2] = static_cast<int16_t>(q[i + 1]);
    pairs[i + 3] = static_cast<int16_t>(q[i + 3]);
  }
  std::memcpy(to, pairs, sizeof(pairs));
}

HWY_INLINE void StoreBytes(const int32_t (&q)[kChunk], std::byte* to) {
  int8_t bytes[2 * kChunk];
  for (size_t i = 0; i < kChunk; ++i) {
    const auto low = static_cast<int8_t>(q[i] & 0xff);
    bytes[i] = static_cast<int8_t>((q[i] - low) / 256);
    bytes[kChunk + i] = low;
  }
  std::memcpy(to, bytes, sizeof(bytes));
}

void DigitsOfRows(const float* x, int64_t rows, int64_t k, int64_t ld, DigitForm form,
                  std::byte* digits, float* scales, int32_t* sums) {
  const int64_t chunks = (k + kPackedChunkColumns - 1) / kPackedChunkColumns;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t col = chunk * kPackedChunkColumns;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = chunk * rows + i;
      int32_t q[kChunk];
      Quantise(x + i * ld + col, static_cast<size_t>(std::min(kPackedChunkColumns, k - col)), q,
               scales[at], sums[at]);
      std::byte* to = digits + at * DigitBytes(form);
      if (form == DigitForm::kPairsAndBytes) {
        StorePairs(q, to);
        to += kBytesAt;
      }
      StoreBytes(q, to);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(PackedDot);
HWY_EXPORT(DigitsOfRows);

bool VnniSelected() {
  return ActiveIsa().starts_with("avx512") && CpuHasVnni();
}

void PackDigits(const float* x, int64_t rows, int64_t k, int64_t ld, DigitForm form,
                std::byte* digits, float* scales, int32_t* sums) {
  HWY_DYNAMIC_DISPATCH(DigitsOfRows)(x, rows, k, ld, form, digits, scales, sums);
}

void RunPackedDotPairs(const PackedDotTask& task) {
  HWY_DYNAMIC_DISPATCH(PackedDot)(task);
}

}  // namespace winnow
#endif  // HWY_ONCE
