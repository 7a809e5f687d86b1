// Packed matrices: names, sizes, and that every code and value comes back from the bytes.
#include "base/packed_format.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "base/dtype.h"

namespace winnow {
namespace {

TEST(PackedFormat, NamesGoBothWays) {
  for (const char* name : {"2bit", "3bit", "4bit", "5bit", "6bit", "7bit", "8bit", "4bit-asym",
                           "4bit-asym-g64", "3bit-g128", "2bit-log", "4bit-log-g64", "4bit-curve",
                           "2bit-curve-g64", "6bit-shift", "4bit-shift-g128"}) {
    const std::optional<PackedFormat> format = PackedFormatFromName(name);
    ASSERT_TRUE(format) << name;
    EXPECT_EQ(PackedFormatName(*format), name);
  }
  for (const char* name :
       {"", "bit", "1bit", "9bit", "4", "4bits", "4bit-", "4bit-g32", "4bit-g64-asym", "8bit-log",
        "4bit-asym-log", "4bit-asym-shift", "4bit-shift-asym", "+4bit", "44bit", "bf16"}) {
    EXPECT_FALSE(PackedFormatFromName(name)) << name;
  }
}

TEST(PackedFormat, SizesCountScalesAndPadding) {
  // 16 rows of 32 columns: one group of 16 scales (32 bytes, padded to 64) and 512 codes.
  EXPECT_EQ(PackedBytes({.bits = 4}, 16, 32), 64u + 256u);
  EXPECT_EQ(PackedBytes({.bits = 8}, 16, 32), 64u + 512u);
  EXPECT_EQ(PackedBytes({.bits = 3}, 16, 32), 64u + 192u);
  EXPECT_EQ(PackedBytes({.bits = 4}, 17, 33), 2 * (64u + 512u));
  EXPECT_EQ(PackedBytes({.bits = 4, .grid = PackedGrid::kAsymmetric}, 16, 64), 128u + 512u);
  // At widths of real models the padding is gone: 4.5 bits a weight.
  EXPECT_EQ(PackedBytes({.bits = 4}, 1024, 2048), 1024u * 2048u * 9 / 16);
  EXPECT_DOUBLE_EQ(PackedBitsPerWeight({.bits = 4}), 4.5);
  EXPECT_DOUBLE_EQ(
      PackedBitsPerWeight({.bits = 4, .group_columns = 64, .grid = PackedGrid::kAsymmetric}), 4.5);
}

TEST(PackedFormat, TheLogGridHalves) {
  const auto log_grid = [](int bits) {
    return GridLevels({.bits = bits, .grid = PackedGrid::kLogarithmic});
  };
  EXPECT_EQ(log_grid(2), (std::array<int8_t, 16>{64, 32, -64, -32}));
  EXPECT_EQ(log_grid(3), (std::array<int8_t, 16>{64, 32, 16, 8, -64, -32, -16, -8}));
  EXPECT_EQ(log_grid(4)[6], 1);
  EXPECT_EQ(log_grid(4)[7], 0);
  EXPECT_EQ(log_grid(4)[14], -1);
}

TEST(PackedFormat, RowsComeBack) {
  std::mt19937 random(7);
  const int64_t rows = 19, cols = 77;
  for (const char* name : {"2bit", "3bit", "4bit", "5bit", "6bit", "7bit", "8bit", "4bit-asym",
                           "3bit-asym-g64", "4bit-log", "4bit-curve", "3bit-curve", "4bit-shift",
                           "8bit-shift-g64", "2bit-log-g64", "5bit-g128"}) {
    const PackedFormat format = *PackedFormatFromName(name);
    const int64_t groups = (cols + format.group_columns - 1) / format.group_columns;
    std::vector<std::byte> bytes(PackedBytes(format, rows, cols));
    std::vector<std::vector<uint8_t>> codes(rows, std::vector<uint8_t>(cols));
    std::vector<std::vector<uint16_t>> scales(rows, std::vector<uint16_t>(groups));
    std::vector<std::vector<uint16_t>> minima = scales;
    for (int64_t row = 0; row < rows; ++row) {
      const auto r = static_cast<size_t>(row);
      for (uint8_t& code : codes[r]) code = static_cast<uint8_t>(random() % (1u << format.bits));
      for (uint16_t& scale : scales[r])
        scale = F16FromFloat(0.25f + static_cast<float>(random() % 8000) / 1000);
      for (uint16_t& minimum : minima[r]) minimum = F16FromFloat(-static_cast<float>(random() % 8));
      StorePackedRow(format, cols, row, {codes[r].data(), scales[r].data(), minima[r].data()},
                     bytes.data());
    }
    std::vector<float> block(kPackedRows * cols);  // the second, of which three rows exist
    UnpackBlock(format, cols, bytes.data() + PackedBlockBytes(format, cols), block.data());
    for (int64_t row = kPackedRows; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        ASSERT_EQ(block[static_cast<size_t>((row - kPackedRows) * cols + col)],
                  LoadPackedValue(format, cols, row, col, bytes.data()))
            << name << " " << row << " " << col;
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) {
        const auto r = static_cast<size_t>(row), c = static_cast<size_t>(col);
        const auto g = static_cast<size_t>(col / format.group_columns);
        const int code = codes[r][c];
        ASSERT_EQ(LoadPackedCode(format, cols, row, col, bytes.data()), code) << name;
        double scale = static_cast<double>(FloatFromF16(scales[r][g]));
        double number = code;
        if (HasLevels(format)) number = GridLevels(format)[static_cast<size_t>(code)];
        if (format.grid == PackedGrid::kSymmetric || format.grid == PackedGrid::kShifted) {
          number -= 1 << (format.bits - 1);
        }
        double minimum = 0;
        if (format.grid == PackedGrid::kAsymmetric) {
          minimum = static_cast<double>(FloatFromF16(minima[r][g]));
        }
        if (HasLevels(format)) scale /= 64;
        if (HasShift(format)) {
          // These f16 have ten bits, of which the last five are the shift's.
          const int shift = scales[r][g] & 31;
          scale = static_cast<double>(FloatFromF16(static_cast<uint16_t>(scales[r][g] - shift)));
          scale /= HasLevels(format) ? 64 * 256 : 256;
          minimum =
              (shift - 16) * scale * (HasLevels(format) ? 1.5 : 3.0 / 256 * (1 << format.bits));
        }
        const auto expected = static_cast<float>(number * scale + minimum);
        ASSERT_EQ(LoadPackedValue(format, cols, row, col, bytes.data()), expected) << name;
      }
    }
  }
}

}  // namespace
}  // namespace winnow
