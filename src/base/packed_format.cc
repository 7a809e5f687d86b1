#include "base/packed_format.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "base/checked_math.h"
#include "base/dtype.h"
#include "base/error.h"

namespace winnow {
namespace {

constexpr std::string_view kWhat = "packed matrix";

// The plane of `bits` that holds bit `from` and the ones above it: its width.
int PlaneWidth(int bits, int from) {
  const int left = bits - from;
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Calls visit(byte offset in the chunk, shift in the byte, width, position in the code) for every
// plane's part of the code at `row` (of 16) and `col` (of 32).
template <class Visit>
void ForEachPlane(int bits, int64_t row, int64_t col, const Visit& visit) {
  const int64_t v = col / 4;
  int64_t plane = 0;  // bytes
  for (int from = 0; from < bits;) {
    const int width = PlaneWidth(bits, from);
    const int64_t vector = v % width;
    const auto shift = static_cast<int>(v / width) * width;
    visit(plane + vector * 64 + row * 4 + col % 4, shift, width, from);
    plane += 64 * width;
    from += width;
  }
}

uint16_t LoadHalf(const std::byte* from) {
  uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

// The codes of a chunk in the order of its vectors, [columns / 4][row][column % 4].
void UnpackCodes(int bits, const std::byte* chunk, uint8_t* codes) {
  std::memset(codes, 0, kPackedRows * kPackedChunkColumns);
  for (int from = 0; from < bits;) {
    const int width = PlaneWidth(bits, from);
    const unsigned mask = (1u << width) - 1;
    for (int j = 0; j < width; ++j) {
      for (int s = 0; s < 8 / width; ++s) {
        uint8_t* to = codes + (j + width * s) * 64;
        for (int i = 0; i < 64; ++i) {
          const unsigned part =
              (std::to_integer<unsigned>(chunk[j * 64 + i]) >> (width * s)) & mask;
          to[i] = static_cast<uint8_t>(to[i] | (part << from));
        }
      }
    }
    chunk += 64 * width;
    from += width;
  }
}

// What one code stands for.
float ValueOf(const PackedFormat& format, const std::array<int8_t, 16>& grid, int code,
              const GroupValues& group) {
  const int level = HasLevels(format) ? grid[static_cast<size_t>(code)] : code - PackedZero(format);
  // Exact in f64, so rounded once, as a fused multiply-add does it.
  return static_cast<float>(static_cast<double>(level) * static_cast<double>(group.scale) +
                            static_cast<double>(group.minimum));
}

// Where the row's scale of `group` lies in its block; `part` 1: the minimum.
int64_t HalfOffset(const PackedFormat& format, int64_t cols, int64_t row, int64_t group, int part) {
  const int64_t groups = CeilDiv(cols, format.group_columns);
  return ((part * groups + group) * kPackedRows + row) * 2;
}

int64_t ChunkOffset(const PackedFormat& format, int64_t cols, int64_t col) {
  return static_cast<int64_t>(PackedCodesOffset(format, cols)) +
         col / kPackedChunkColumns * 64 * format.bits;
}

}  // namespace

std::optional<PackedFormat> PackedFormatFromName(std::string_view name) {
  PackedFormat format;
  const auto [end, problem] = std::from_chars(name.data(), name.data() + name.size(), format.bits);
  if (problem != std::errc() || format.bits < 2 || format.bits > 8) return std::nullopt;
  name.remove_prefix(static_cast<size_t>(end - name.data()));
  const auto take = [&](std::string_view part) {
    if (!name.starts_with(part)) return false;
    name.remove_prefix(part.size());
    return true;
  };
  if (!take("bit")) return std::nullopt;
  if (take("-asym")) {
    format.grid = PackedGrid::kAsymmetric;
  } else if (take("-shift")) {
    format.grid = PackedGrid::kShifted;
  } else if (take("-log")) {
    format.grid = PackedGrid::kLogarithmic;
  } else if (take("-curve")) {
    format.grid = PackedGrid::kCurved;
  }
  if (take("-g64")) {
    format.group_columns = 64;
  } else if (take("-g128")) {
    format.group_columns = 128;
  }
  if (HasLevels(format) && format.bits > 4) return std::nullopt;
  // One name for each format: nothing is left, and no part came twice or in another order.
  return name.empty() ? std::optional(format) : std::nullopt;
}

std::string PackedFormatName(const PackedFormat& format) {
  std::string name = fmt::format("{}bit", format.bits);
  if (format.grid == PackedGrid::kAsymmetric) name += "-asym";
  if (format.grid == PackedGrid::kShifted) name += "-shift";
  if (format.grid == PackedGrid::kLogarithmic) name += "-log";
  if (format.grid == PackedGrid::kCurved) name += "-curve";
  if (format.group_columns != 32) name += fmt::format("-g{}", format.group_columns);
  return name;
}

uint64_t PackedCodesOffset(const PackedFormat& format, int64_t cols) {
  const uint64_t parts = format.grid == PackedGrid::kAsymmetric ? 2 : 1;
  const uint64_t halves = CheckedMul(static_cast<uint64_t>(CeilDiv(cols, format.group_columns)),
                                     parts * kPackedRows * 2, kWhat);
  return CheckedAdd(halves, kPackedAlignment - 1, kWhat) / kPackedAlignment * kPackedAlignment;
}

uint64_t PackedBlockBytes(const PackedFormat& format, int64_t cols) {
  const auto chunks = static_cast<uint64_t>(CeilDiv(cols, kPackedChunkColumns));
  return CheckedAdd(PackedCodesOffset(format, cols),
                    CheckedMul(chunks, 64 * static_cast<uint64_t>(format.bits), kWhat), kWhat);
}

uint64_t PackedBytes(const PackedFormat& format, int64_t rows, int64_t cols) {
  return CheckedMul(static_cast<uint64_t>(CeilDiv(rows, kPackedRows)),
                    PackedBlockBytes(format, cols), kWhat);
}

double PackedBitsPerWeight(const PackedFormat& format) {
  const double halves = format.grid == PackedGrid::kAsymmetric ? 2 : 1;
  return format.bits + 16 * halves / static_cast<double>(format.group_columns);
}

std::array<int8_t, 16> GridLevels(const PackedFormat& format) {
  std::array<int8_t, 16> levels{};
  if (format.grid == PackedGrid::kCurved) {
    if (format.bits == 2) return {-127, -46, 6, 70};
    if (format.bits == 3) return {-127, -78, -45, -20, 0, 22, 49, 88};
    return {-127, -98, -79, -64, -50, -36, -23, -11, 0, 11, 23, 36, 50, 65, 83, 105};
  }
  if (format.grid != PackedGrid::kLogarithmic) return levels;
  const int half = 1 << (format.bits - 1);
  for (int code = 0; code < half && code < 8; ++code) {
    const auto step = static_cast<int8_t>(64 >> code);
    levels[static_cast<size_t>(code)] = step;
    levels[static_cast<size_t>(half + code)] = static_cast<int8_t>(-step);
  }
  return levels;
}

float ShiftStep(const PackedFormat& format) {
  if (format.grid == PackedGrid::kCurved) return 1.5f;
  return format.grid == PackedGrid::kShifted ? 3.0f * static_cast<float>(1 << format.bits) / 256
                                             : 0.0f;
}

float ScaleFactor(const PackedFormat& format) {
  return (HasLevels(format) ? 1.0f / 64 : 1.0f) * (HasShift(format) ? 1.0f / 256 : 1.0f);
}

GroupValues DecodeGroup(const PackedFormat& format, uint16_t scale_bits, uint16_t minimum_bits) {
  const float factor = ScaleFactor(format);
  if (!HasShift(format)) {
    const bool minimum = format.grid == PackedGrid::kAsymmetric;
    return {FloatFromF16(scale_bits) * factor, minimum ? FloatFromF16(minimum_bits) : 0.0f};
  }
  const auto shift = static_cast<float>((scale_bits & kShiftMask) - kShiftZero);
  const float scale = FloatFromF16(static_cast<uint16_t>(scale_bits & ~kShiftMask)) * factor;
  return {scale, shift * ShiftStep(format) * scale};
}

GroupValues LoadPackedGroup(const PackedFormat& format, int64_t cols, int64_t lane, int64_t group,
                            const std::byte* block) {
  const uint16_t minimum = format.grid == PackedGrid::kAsymmetric
                               ? LoadHalf(block + HalfOffset(format, cols, lane, group, 1))
                               : uint16_t{0};
  return DecodeGroup(format, LoadHalf(block + HalfOffset(format, cols, lane, group, 0)), minimum);
}

void StorePackedRow(const PackedFormat& format, int64_t cols, int64_t row, const PackedRow& values,
                    std::byte* bytes) {
  std::byte* block =
      bytes + static_cast<uint64_t>(row / kPackedRows) * PackedBlockBytes(format, cols);
  const int64_t lane = row % kPackedRows;
  const int64_t groups = CeilDiv(cols, format.group_columns);
  for (int64_t group = 0; group < groups; ++group) {
    std::memcpy(block + HalfOffset(format, cols, lane, group, 0), &values.scales[group], 2);
    if (format.grid == PackedGrid::kAsymmetric) {
      std::memcpy(block + HalfOffset(format, cols, lane, group, 1), &values.minima[group], 2);
    }
  }
  for (int64_t col = 0; col < cols; ++col) {
    std::byte* chunk = block + ChunkOffset(format, cols, col);
    const unsigned code = values.codes[col];
    ForEachPlane(format.bits, lane, col % kPackedChunkColumns,
                 [&](int64_t at, int shift, int width, int from) {
                   const unsigned part = (code >> from) & ((1u << width) - 1);
                   chunk[at] |= static_cast<std::byte>(part << shift);
                 });
  }
}

uint8_t LoadPackedCode(const PackedFormat& format, int64_t cols, int64_t row, int64_t col,
                       const std::byte* bytes) {
  const std::byte* block =
      bytes + static_cast<uint64_t>(row / kPackedRows) * PackedBlockBytes(format, cols);
  const std::byte* chunk = block + ChunkOffset(format, cols, col);
  unsigned code = 0;
  ForEachPlane(format.bits, row % kPackedRows, col % kPackedChunkColumns,
               [&](int64_t at, int shift, int width, int from) {
                 const unsigned mask = (1u << width) - 1;
                 code |= ((std::to_integer<unsigned>(chunk[at]) >> shift) & mask) << from;
               });
  return static_cast<uint8_t>(code);
}

float LoadPackedValue(const PackedFormat& format, int64_t cols, int64_t row, int64_t col,
                      const std::byte* bytes) {
  const std::byte* block =
      bytes + static_cast<uint64_t>(row / kPackedRows) * PackedBlockBytes(format, cols);
  const int64_t group = col / format.group_columns, lane = row % kPackedRows;
  const int code = LoadPackedCode(format, cols, row, col, bytes);
  return ValueOf(format, GridLevels(format), code,
                 LoadPackedGroup(format, cols, lane, group, block));
}

void UnpackBlock(const PackedFormat& format, int64_t cols, const std::byte* block, float* values) {
  std::array<uint8_t, kPackedRows * kPackedChunkColumns> codes;
  const std::array<int8_t, 16> grid = GridLevels(format);
  for (int64_t first = 0; first < cols; first += kPackedChunkColumns) {
    UnpackCodes(format.bits, block + ChunkOffset(format, cols, first), codes.data());
    const int64_t group = first / format.group_columns;  // groups are whole chunks
    const int64_t end = std::min(cols, first + kPackedChunkColumns);
    for (int64_t row = 0; row < kPackedRows; ++row) {
      const GroupValues shared = LoadPackedGroup(format, cols, row, group, block);
      for (int64_t col = first; col < end; ++col) {
        const int64_t at = (col - first) / 4 * 64 + row * 4 + col % 4;
        values[row * cols + col] = ValueOf(format, grid, codes[static_cast<size_t>(at)], shared);
      }
    }
  }
}

}  // namespace winnow
