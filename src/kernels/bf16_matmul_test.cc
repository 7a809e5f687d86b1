// The bf16 product on any CPU: the driver with its real transpositions and rounding, the inner
// loop's source with the five operations it uses written as loops (after Intel's description of
// VDPBF16PS).
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/bf16_tile.h"
#include "kernels/test_support.h"
#include "kernels/tile_shape.h"

#define WINNOW_BF16_TARGET
#include "kernels/bf16_tile-inl.h"

namespace winnow {
namespace {

// The instruction reads denormals as zero and writes none.
float Flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

template <size_t kVectorLanes, size_t kPanelRows>
struct EmulatedOps {
  static constexpr size_t kLanes = kVectorLanes;
  static constexpr size_t kTileRows = kPanelRows;
  struct Sums {
    float lane[kLanes];
  };
  struct Pairs {
    uint32_t lane[kLanes];
  };

  static Sums Zero() { return {}; }
  static Pairs LoadPairs(const uint32_t* from) {
    Pairs pairs;
    std::copy_n(from, kLanes, pairs.lane);
    return pairs;
  }
  static Pairs BroadcastPair(uint32_t pair) {
    Pairs pairs;
    std::fill_n(pairs.lane, kLanes, pair);
    return pairs;
  }
  static Sums AddDots(Sums sums, const Pairs& x, const Pairs& w) {
    for (size_t i = 0; i < kLanes; ++i) {
      for (const int half : {1, 0}) {  // the odd elements first
        const float a = Flushed(FloatFromBf16(static_cast<uint16_t>(x.lane[i] >> (16 * half))));
        const float b = Flushed(FloatFromBf16(static_cast<uint16_t>(w.lane[i] >> (16 * half))));
        sums.lane[i] = Flushed(std::fma(a, b, sums.lane[i]));
      }
    }
    return sums;
  }
  static Sums AddLoaded(Sums sums, const float* from) {
    for (size_t i = 0; i < kLanes; ++i) sums.lane[i] = from[i] + sums.lane[i];
    return sums;
  }
  static void Store(const Sums& sums, float* to) { std::copy_n(sums.lane, kLanes, to); }
};

// For the tile shape in use.
Bf16TileFunction EmulatedTile() {
  const TileShape shape = ActiveTileShape();
  if (shape.rows == 4 && shape.columns == 2) return Bf16Tile<EmulatedOps<1, 4>>;
  if (shape.rows == 6 && shape.columns == 16) return Bf16Tile<EmulatedOps<8, 6>>;
  EXPECT_EQ(shape.rows, 12);
  EXPECT_EQ(shape.columns, 32);
  return Bf16Tile<EmulatedOps<16, 12>>;
}

class Bf16MatMulTest : public EveryIsa {
 protected:
  std::vector<float> Product(const std::vector<float>& x, int64_t rows, const WeightMatrix& w,
                             ThreadPool& pool) {
    PackedRows packed;
    packed.Pack(x.data(), rows, w.cols, w.cols, pool);
    std::vector<float> y(static_cast<size_t>(rows * w.rows));
    MatMulBf16(packed, w, y.data(), w.rows, pool, EmulatedTile());
    return y;
  }
};
WINNOW_EVERY_ISA(Bf16MatMulTest);

TEST_P(Bf16MatMulTest, WholeNumbersAreExact) {
  ThreadPool pool(2);
  std::mt19937 random(6);
  for (int i = 0; i < 40; ++i) {
    const auto pick = [&] { return kSizes[random() % kSizes.size()]; };
    const int64_t rows = pick(), n = pick(), k = i == 0 ? 1031 : pick();
    SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(n) + " x " + std::to_string(k));
    const std::vector<float> x = SmallIntegers(rows * k, 1);
    const std::vector<float> values = SmallIntegers(n * k, 2);
    const StoredWeight w(values, n, k, Dtype::kBF16);
    const std::vector<float> y = Product(x, rows, w.view(), pool);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < n; ++j) {
        int sum = 0;
        for (int64_t c = 0; c < k; ++c) {
          sum += static_cast<int>(x[r * k + c]) * static_cast<int>(values[j * k + c]);
        }
        ASSERT_EQ(y[r * n + j], static_cast<float>(sum)) << r << ", " << j;
      }
    }
  }
}

// Rounding X by hand first changes nothing, and then the f32 bound holds.
TEST_P(Bf16MatMulTest, RoundsActivationsToNearest) {
  ThreadPool pool(2);
  const int64_t rows = 29, n = 37, k = 301;
  const std::vector<float> x = Normals(rows * k, 1);
  std::vector<float> rounded = x;
  for (float& v : rounded) v = FloatFromBf16(Bf16FromFloat(v));
  const StoredWeight w(Normals(n * k, 2), n, k, Dtype::kBF16);
  const std::vector<float> y = Product(x, rows, w.view(), pool);
  EXPECT_TRUE(SameBits(y, Product(rounded, rows, w.view(), pool)));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      double magnitude = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double term = static_cast<double>(rounded[i * k + c]) * w.at(j, c);
        sum += term;
        magnitude += std::fabs(term);
      }
      ASSERT_NEAR(y[i * n + j], sum, static_cast<double>(k) * kUnit * magnitude);
    }
  }
}

TEST_P(Bf16MatMulTest, RoundsEveryKindOfValueLikeTheScalarConversion) {
  // Against the identity: y is X rounded.
  ThreadPool pool(1);
  std::vector<float> x = {0.0f,        -0.0f,         1.0f,          1.00390625f, 1.01171875f,
                          -1.0039063f, 3.3895314e38f, 3.4028235e38f, 1e30f,       65535.0f};
  const std::vector<float> random = Normals(54, 1);
  x.insert(x.end(), random.begin(), random.end());
  const int64_t k = 64;
  std::vector<float> identity(static_cast<size_t>(k * k));
  for (int64_t i = 0; i < k; ++i) identity[i * k + i] = 1;
  const StoredWeight w(identity, k, k, Dtype::kBF16);
  for (int64_t i = 0; i < k; ++i) {  // alone, so that an infinity does not meet a 0
    std::vector<float> one(static_cast<size_t>(k));
    one[i] = x[i];
    const float want = FloatFromBf16(Bf16FromFloat(x[i]));
    EXPECT_EQ(Product(one, 1, w.view(), pool)[i], want) << x[i];
  }
  std::vector<float> nan(static_cast<size_t>(k), std::nanf(""));
  for (const float v : Product(nan, 1, w.view(), pool)) EXPECT_TRUE(std::isnan(v));
}

TEST_P(Bf16MatMulTest, SameBitsForAnyPartition) {
  ThreadPool one(1);
  const int64_t rows = 100, n = 70, k = 517;
  const std::vector<float> x = Normals(rows * k, 3);
  const StoredWeight w(Normals(n * k, 4), n, k, Dtype::kBF16);
  const std::vector<float> all = Product(x, rows, w.view(), one);
  for (const int threads : {2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_TRUE(SameBits(Product(x, rows, w.view(), pool), all)) << threads;
  }
  for (int64_t count = 1; count <= 13; ++count) {
    const std::vector<float> part(x.begin() + 37 * k, x.begin() + (37 + count) * k);
    const std::vector<float> expected(all.begin() + 37 * n, all.begin() + (37 + count) * n);
    EXPECT_TRUE(SameBits(Product(part, count, w.view(), one), expected)) << count;
  }
}

TEST_P(Bf16MatMulTest, FlagNeverTouchesOtherInstructionSetsOrFormats) {
  ThreadPool pool(1);
  const int64_t rows = 9, n = 20, k = 33;
  const std::vector<float> x = Normals(rows * k, 5);
  PackedRows packed;
  packed.Pack(x.data(), rows, k, k, pool);
  for (const Dtype dtype : kDtypes) {
    const StoredWeight w(Normals(n * k, 6), n, k, dtype);
    std::vector<float> plain(static_cast<size_t>(rows * n));
    std::vector<float> not_allowed = plain;
    std::vector<float> allowed = plain;
    MatMul(packed, w.view(), plain.data(), n, pool);
    MatMul(packed, w.view(), not_allowed.data(), n, pool, ComputePrecision::kF32);
    MatMul(packed, w.view(), allowed.data(), n, pool, ComputePrecision::kAuto);
    EXPECT_TRUE(SameBits(not_allowed, plain));
    const bool dots = GetParam() == "avx512_bf16" && dtype == Dtype::kBF16;
    EXPECT_EQ(SameBits(allowed, plain), !dots);
    // Where the CPU has the instructions, they do what the loops above do.
    if (dots) {
      EXPECT_TRUE(SameBits(allowed, Product(x, rows, w.view(), pool)));
    }
  }
}

}  // namespace
}  // namespace winnow
