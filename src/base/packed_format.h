// How a weight matrix is stored in few bits: integers of 2 to 8 bits, groups of columns that share
// a scale, in the order the product kernels read them. Named by config.json and the command line,
// written by quantize/, read by kernels/. docs/FORMATS.md has the layout for other readers.
//
// The matrix [rows, cols] is cut into blocks of 16 rows, each one run of bytes, 64-aligned:
//   scales   [groups][16] f16 (with HasShift scale and shift in those 16 bits), then with
//            kAsymmetric minima [groups][16] f16; zeros up to 64 bytes
//   codes    chunks of 32 columns; a chunk has 64 * bits bytes: its planes one after the other
// A chunk's 512 codes are 8 vectors of 64 bytes, vector v = columns 4v..4v+3 of all rows, [16][4].
// A plane of p bits (p = 8, 4, 2, 1) holds p bits of every code in p vectors of 64 bytes: vector j
// has those of v = j + p * s in its bits p * s..p * s + p - 1, s < 8 / p. Codes are cut from their
// low end: 8 = {8}, 7 = {4, 2, 1}, 6 = {4, 2}, 5 = {4, 1}, 4 = {4}, 3 = {2, 1}, 2 = {2}. Rows past
// the last and columns past the last have scale 0, minimum 0 and code 0.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace winnow {

inline constexpr int64_t kPackedRows = 16;          // rows of a block
inline constexpr int64_t kPackedChunkColumns = 32;  // columns of a chunk
inline constexpr uint64_t kPackedAlignment = 64;    // bytes; of a block and of a matrix

enum class PackedGrid : uint8_t {
  kSymmetric,   // (code - 2^(bits - 1)) * scale
  kAsymmetric,  // code * scale + minimum
  kShifted,     // (code - 2^(bits - 1) + shift) * scale
  // From a table of levels, 2 to 4 bits:
  kLogarithmic,  // GridLevels[code] / 64 * scale: powers of two (MoQE, arXiv 2310.02410, 3.1)
  kCurved,       // (GridLevels[code] + shift) / 64 * scale: denser around zero, as weights are
};

struct PackedFormat {
  int bits = 0;                // 2..8; 0: not packed
  int64_t group_columns = 32;  // that share a scale: 32, 64 or 128
  PackedGrid grid = PackedGrid::kSymmetric;

  bool empty() const { return bits == 0; }
  bool operator==(const PackedFormat&) const = default;
};

// "4bit", "4bit-g64", "4bit-asym-g64", "4bit-curve", "6bit-shift": bits, grid if not symmetric,
// group if not 32. Nothing if the name is none of these or the combination does not exist.
std::optional<PackedFormat> PackedFormatFromName(std::string_view name);
std::string PackedFormatName(const PackedFormat& format);

// Bytes of a packed matrix and of one of its blocks of rows. ModelError if they overflow.
uint64_t PackedBlockBytes(const PackedFormat& format, int64_t cols);
uint64_t PackedBytes(const PackedFormat& format, int64_t rows, int64_t cols);
// Where codes begin in a block.
uint64_t PackedCodesOffset(const PackedFormat& format, int64_t cols);
// Mean bits a weight takes with its share of scales, for tables.
double PackedBitsPerWeight(const PackedFormat& format);

// Whether codes stand for levels of a table rather than for themselves.
inline bool HasLevels(const PackedFormat& format) {
  return format.grid == PackedGrid::kLogarithmic || format.grid == PackedGrid::kCurved;
}
// Whether the grid of every group may be shifted. The 16 bits of a group then are an f16 of which
// the lowest kShiftBits are not the scale's but the shift, t - kShiftZero steps of ShiftStep; the
// scale is the rest times 2^-8, so that small ones keep their bits. It costs no byte: of two
// hundred placings of a grid one fits 32 weights far better than the finest scale of a fixed one.
inline bool HasShift(const PackedFormat& format) {
  return format.grid == PackedGrid::kShifted || format.grid == PackedGrid::kCurved;
}
inline constexpr int kShiftBits = 5;
inline constexpr uint16_t kShiftMask = (1 << kShiftBits) - 1;
inline constexpr int32_t kShiftZero = 16;
// In codes (kShifted) or levels (kCurved): 3/16 of half the range in all, to either side.
float ShiftStep(const PackedFormat& format);
// What an f16 scale is multiplied by: a power of two.
float ScaleFactor(const PackedFormat& format);

// What the 16 bits of a group's scale (and of its minimum) say: a weight is
// (level or code - PackedZero) * scale + minimum.
struct GroupValues {
  float scale = 0, minimum = 0;
};
GroupValues DecodeGroup(const PackedFormat& format, uint16_t scale_bits, uint16_t minimum_bits);
// The same of a group of columns in row `lane` (of 16) of a block.
GroupValues LoadPackedGroup(const PackedFormat& format, int64_t cols, int64_t lane, int64_t group,
                            const std::byte* block);
// What is taken from a code that stands for itself.
inline int32_t PackedZero(const PackedFormat& format) {
  return format.grid == PackedGrid::kAsymmetric || HasLevels(format) ? 0 : 1 << (format.bits - 1);
}

// What a code of such a grid stands for, in 64ths of the scale; zeros for the other grids.
// Logarithmic: the sign is the highest bit, the others count halvings; the smallest step of 4 bits
// would be half a 64th and is zero instead. Curved: ascending, the levels that lose least on groups
// of 32 of which half are Gaussian and half Laplacian, found by Lloyd's method with the best scale
// for each group, of either sign (as -127 has no counterpart), before shifts.
std::array<int8_t, 16> GridLevels(const PackedFormat& format);

// One row of codes and what they stand for, as a quantiser makes them and a reader gets them back.
// `codes` [cols], `scales` and `minima` [groups] as stored, minima with kAsymmetric alone.
struct PackedRow {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint16_t* minima = nullptr;
};
// Writes row `row` of a matrix into its `bytes` [PackedBytes], which start as zeros.
void StorePackedRow(const PackedFormat& format, int64_t cols, int64_t row, const PackedRow& values,
                    std::byte* bytes);
// The code and the value of one weight: the reference every kernel is tested against.
uint8_t LoadPackedCode(const PackedFormat& format, int64_t cols, int64_t row, int64_t col,
                       const std::byte* bytes);
float LoadPackedValue(const PackedFormat& format, int64_t cols, int64_t row, int64_t col,
                      const std::byte* bytes);
// All of a block of kPackedRows rows at once, [kPackedRows, cols], the same values: for callers
// that look at every weight and multiply nothing. `block` is PackedBlockBytes.
void UnpackBlock(const PackedFormat& format, int64_t cols, const std::byte* block, float* values);

}  // namespace winnow
