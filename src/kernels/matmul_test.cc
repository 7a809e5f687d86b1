#include "kernels/matmul.h"

#include <cmath>
#include <limits>

#include "base/error.h"
#include "kernels/matvec.h"
#include "kernels/test_support.h"

namespace winnow {
namespace {

struct Shape {
  int64_t rows, n, k;
};

std::string Name(const Shape& shape, Dtype dtype) {
  return std::to_string(shape.rows) + " x " + std::to_string(shape.n) + " x " +
         std::to_string(shape.k) + " " + std::string(DtypeName(dtype));
}

// Every size in every place once, beside two fixed others, and 100 random triples.
std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (const int64_t size : kSizes) {
    shapes.push_back({size, 17, 33});
    shapes.push_back({7, size, 65});
    shapes.push_back({13, 33, size});
  }
  std::mt19937 random(5);
  for (int i = 0; i < 100; ++i) {
    const auto pick = [&] { return kSizes[random() % kSizes.size()]; };
    const int64_t rows = pick(), n = pick(), k = pick();
    shapes.push_back({rows, n, k});
  }
  shapes.push_back({19, 40, 1030});  // five blocks of columns, the last short
  return shapes;
}

std::vector<float> Product(const std::vector<float>& x, int64_t rows, const WeightMatrix& w,
                           ThreadPool& pool) {
  PackedRows packed;
  packed.Pack(x.data(), rows, w.cols, w.cols, pool);
  std::vector<float> y(static_cast<size_t>(rows * w.rows));
  MatMul(packed, w, y.data(), w.rows, pool);
  return y;
}

std::vector<float> VecProduct(const std::vector<float>& x, int64_t rows, const WeightMatrix& w,
                              ThreadPool& pool) {
  std::vector<float> y(static_cast<size_t>(rows * w.rows));
  MatVec(x.data(), rows, w, y.data(), w.rows, pool);
  return y;
}

// Both references at once: double sums, and the bound of kUnit's comment.
void ExpectNearReference(const std::vector<float>& y, const std::vector<float>& x, int64_t rows,
                         const StoredWeight& w) {
  const int64_t n = w.view().rows;
  const int64_t k = w.view().cols;
  std::vector<float> expected(y.size());
  MatMulReference(x.data(), rows, k, w.view(), expected.data(), n);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double magnitude = 0;
      for (int64_t c = 0; c < k; ++c) {
        magnitude += std::fabs(static_cast<double>(x[i * k + c]) * w.at(j, c));
      }
      // Two roundings a step where there is no FMA, one more of the reference itself.
      const double bound = static_cast<double>(2 * k + 1) * kUnit * magnitude;
      ASSERT_NEAR(y[i * n + j], expected[i * n + j], bound) << i << ", " << j;
    }
  }
}

TEST(MatMulReferenceTest, SumsByHand) {
  const std::vector<float> x = {1, 2, 3, 99, -1, 0.5f, 2, 99};  // ld 4
  const StoredWeight w({1, 10, 100, 4, 5, 6}, 2, 3, Dtype::kF32);
  float y[5] = {7, 7, 7, 7, 7};
  MatMulReference(x.data(), 2, 4, w.view(), y, 3);
  EXPECT_EQ(y[0], 321);
  EXPECT_EQ(y[1], 32);
  EXPECT_EQ(y[2], 7);  // beyond n
  EXPECT_EQ(y[3], 204);
  EXPECT_EQ(y[4], 10.5f);
}

class MatMulTest : public EveryIsa {};
WINNOW_EVERY_ISA(MatMulTest);

TEST_P(MatMulTest, WholeNumbersAreExact) {
  ThreadPool pool(2);
  for (const Shape& shape : Shapes()) {
    const std::vector<float> x = SmallIntegers(shape.rows * shape.k, 1);
    const std::vector<float> values = SmallIntegers(shape.n * shape.k, 2);
    for (const Dtype dtype : kDtypes) {
      SCOPED_TRACE(Name(shape, dtype));
      const StoredWeight w(values, shape.n, shape.k, dtype);
      const std::vector<float> y = Product(x, shape.rows, w.view(), pool);
      const std::vector<float> by_vec = VecProduct(x, shape.rows, w.view(), pool);
      for (int64_t i = 0; i < shape.rows; ++i) {
        for (int64_t j = 0; j < shape.n; ++j) {
          int sum = 0;
          for (int64_t c = 0; c < shape.k; ++c) {
            sum += static_cast<int>(x[i * shape.k + c]) * static_cast<int>(values[j * shape.k + c]);
          }
          ASSERT_EQ(y[i * shape.n + j], static_cast<float>(sum)) << i << ", " << j;
          ASSERT_EQ(by_vec[i * shape.n + j], static_cast<float>(sum)) << i << ", " << j;
        }
      }
    }
  }
}

TEST_P(MatMulTest, StaysWithinTheRoundingBound) {
  ThreadPool pool(1);
  for (const Shape& shape : {Shape{37, 33, 300}, Shape{8, 100, 257}, Shape{65, 17, 1030}}) {
    const std::vector<float> x = Normals(shape.rows * shape.k, 1);
    for (const Dtype dtype : kDtypes) {
      SCOPED_TRACE(Name(shape, dtype));
      const StoredWeight w(Normals(shape.n * shape.k, 2), shape.n, shape.k, dtype);
      ExpectNearReference(Product(x, shape.rows, w.view(), pool), x, shape.rows, w);
      ExpectNearReference(VecProduct(x, shape.rows, w.view(), pool), x, shape.rows, w);
    }
  }
}

TEST_P(MatMulTest, SameBitsForAnyNumberOfThreads) {
  // Sizes that are cut differently: many columns, many rows, few of both.
  for (const Shape& shape : {Shape{100, 300, 300}, Shape{1500, 40, 70}, Shape{5, 33, 600}}) {
    const std::vector<float> x = Normals(shape.rows * shape.k, 3);
    const StoredWeight w(Normals(shape.n * shape.k, 4), shape.n, shape.k, Dtype::kBF16);
    ThreadPool one(1);
    const std::vector<float> y = Product(x, shape.rows, w.view(), one);
    const std::vector<float> by_vec = VecProduct(x, shape.rows, w.view(), one);
    for (const int threads : {2, 3, 8}) {
      ThreadPool pool(threads);
      EXPECT_TRUE(SameBits(Product(x, shape.rows, w.view(), pool), y)) << threads;
      EXPECT_TRUE(SameBits(VecProduct(x, shape.rows, w.view(), pool), by_vec)) << threads;
    }
    PackedRows packed;
    packed.Pack(x.data(), shape.rows, shape.k, shape.k, one);
    std::vector<float> single(y.size());
    MatMulSingle(packed, w.view(), single.data(), shape.n);
    EXPECT_TRUE(SameBits(single, y));
  }
}

TEST_P(MatMulTest, SameBitsWhateverElseIsComputedWithARow) {
  ThreadPool pool(3);
  const int64_t rows = 100, n = 45, k = 517;
  const std::vector<float> x = Normals(rows * k, 5);
  for (const Dtype dtype : kDtypes) {
    const StoredWeight w(Normals(n * k, 6), n, k, dtype);
    const std::vector<float> all = Product(x, rows, w.view(), pool);
    // One row alone, and every count of rows a panel can hold.
    for (const auto& [first, count] : std::vector<std::pair<int64_t, int64_t>>{{37, 1},
                                                                               {0, 2},
                                                                               {50, 3},
                                                                               {3, 4},
                                                                               {91, 5},
                                                                               {7, 6},
                                                                               {8, 7},
                                                                               {20, 11},
                                                                               {5, 12},
                                                                               {60, 13}}) {
      const std::vector<float> part(x.begin() + first * k, x.begin() + (first + count) * k);
      const std::vector<float> y = Product(part, count, w.view(), pool);
      const std::vector<float> expected(all.begin() + first * n, all.begin() + (first + count) * n);
      EXPECT_TRUE(SameBits(y, expected)) << first << " +" << count;
    }
    // Some of W's rows alone.
    WeightMatrix some = w.view();
    some.data += 19 * k * (DtypeBits(dtype) / 8);
    some.rows = 9;
    const std::vector<float> y = Product(x, rows, some, pool);
    for (int64_t i = 0; i < rows; ++i) {
      EXPECT_EQ(std::memcmp(&y[i * 9], &all[i * n + 19], 9 * sizeof(float)), 0) << i;
    }
  }
}

TEST_P(MatMulTest, MatVecRowsDoNotDependOnEachOther) {
  ThreadPool pool(2);
  const int64_t n = 53;
  for (const int64_t k :
       {333, 1101}) {  // single rows of W as wide as this are taken four at a time
    const std::vector<float> x = Normals(8 * k, 7);
    for (const Dtype dtype : kDtypes) {
      const StoredWeight w(Normals(n * k, 8), n, k, dtype);
      const std::vector<float> all = VecProduct(x, 8, w.view(), pool);
      for (int64_t rows = 1; rows <= 8; ++rows) {
        for (int64_t first = 0; first + rows <= 8; ++first) {
          const std::vector<float> part(x.begin() + first * k, x.begin() + (first + rows) * k);
          const std::vector<float> expected(all.begin() + first * n,
                                            all.begin() + (first + rows) * n);
          EXPECT_TRUE(SameBits(VecProduct(part, rows, w.view(), pool), expected)) << rows;
        }
      }
      WeightMatrix some = w.view();
      some.data += 5 * k * (DtypeBits(dtype) / 8);
      some.rows = 3;
      const std::vector<float> y = VecProduct(x, 1, some, pool);
      EXPECT_EQ(std::memcmp(y.data(), &all[5], 3 * sizeof(float)), 0);
    }
  }
}

TEST_P(MatMulTest, GatheredAndStridedRowsGiveTheSameBits) {
  ThreadPool pool(2);
  const int64_t rows = 31, n = 20, k = 261, ld = 270;
  const std::vector<float> x = Normals(rows * ld, 9);
  const StoredWeight w(Normals(n * k, 10), n, k, Dtype::kF16);
  std::vector<int32_t> index;
  for (int32_t i = 0; i < 40; ++i) index.push_back(i * 7 % 31);  // repeats some
  std::vector<float> plain;
  for (const int32_t i : index)
    plain.insert(plain.end(), x.begin() + i * ld, x.begin() + i * ld + k);
  const std::vector<float> expected = Product(plain, 40, w.view(), pool);

  PackedRows packed;
  packed.PackGathered(x.data(), index, k, ld, pool);
  std::vector<float> y(static_cast<size_t>(40 * n));
  MatMul(packed, w.view(), y.data(), n, pool);
  EXPECT_TRUE(SameBits(y, expected));

  packed.Pack(x.data(), rows, k, ld, pool);
  y.assign(static_cast<size_t>(rows * n), 0);
  MatMul(packed, w.view(), y.data(), n, pool);
  EXPECT_EQ(std::memcmp(y.data() + 7 * n, expected.data() + n, n * sizeof(float)), 0);
}

TEST_P(MatMulTest, WritesOnlyItsColumns) {
  ThreadPool pool(2);
  const int64_t rows = 13, n = 21, k = 300, ld = 29;
  const std::vector<float> x = Normals(rows * k, 11);
  const StoredWeight w(Normals(n * k, 12), n, k, Dtype::kF32);
  PackedRows packed;
  packed.Pack(x.data(), rows, k, k, pool);
  for (const bool vec : {false, true}) {
    std::vector<float> y(static_cast<size_t>(rows * ld), 123.0f);
    if (vec) {
      MatVec(x.data(), rows, w.view(), y.data(), ld, pool);
    } else {
      MatMul(packed, w.view(), y.data(), ld, pool);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = n; j < ld; ++j) ASSERT_EQ(y[i * ld + j], 123.0f);
      for (int64_t j = 0; j < n; ++j) ASSERT_NE(y[i * ld + j], 123.0f);
    }
  }
}

TEST_P(MatMulTest, NothingToDo) {
  ThreadPool pool(2);
  const StoredWeight w(Normals(6, 1), 2, 3, Dtype::kF32);
  PackedRows packed;
  packed.Pack(nullptr, 0, 3, 3, pool);
  MatMul(packed, w.view(), nullptr, 2, pool);
  MatMulSingle(packed, w.view(), nullptr, 2);
  packed.PackGathered(nullptr, {}, 3, 3, pool);
  MatMul(packed, w.view(), nullptr, 2, pool);
  packed.PackSwiGlu(nullptr, nullptr, 0, 3, 3, pool);
  EXPECT_EQ(packed.rows(), 0);
  MatVec(nullptr, 0, w.view(), nullptr, 2, pool);
  EXPECT_EQ(PackedRows::Bytes(0, 100), 0u);

  const float x[3] = {1, 2, 3};
  packed.Pack(x, 1, 3, 3, pool);
  WeightMatrix no_rows = w.view();
  no_rows.rows = 0;
  MatMul(packed, no_rows, nullptr, 0, pool);
  // A sum of nothing is 0.
  packed.Pack(x, 1, 0, 3, pool);
  WeightMatrix no_columns = w.view();
  no_columns.cols = 0;
  float y[2] = {5, 5};
  MatMul(packed, no_columns, y, 2, pool);
  EXPECT_EQ(y[0], 0);
  EXPECT_EQ(y[1], 0);
}

// Rows that are the first columns of longer ones: keys and values in a cache.
TEST_P(MatMulTest, RowsMayBeParts) {
  ThreadPool pool(1);
  const int64_t rows = 9, n = 37, k = 300, stride = 517;
  const std::vector<float> x = Normals(rows * k, 1), wide = Normals(n * stride, 2);
  PackedRows packed;
  packed.Pack(x.data(), rows, k, k, pool);
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16}) {
    std::vector<float> narrow;
    for (int64_t j = 0; j < n; ++j) {
      narrow.insert(narrow.end(), wide.begin() + j * stride, wide.begin() + j * stride + k);
    }
    const StoredWeight parts(wide, n, stride, dtype), whole(narrow, n, k, dtype);
    WeightMatrix view = parts.view();
    view.cols = k;
    view.row_stride = stride;
    std::vector<float> got(static_cast<size_t>(rows * n)), expected(got.size());
    MatMul(packed, view, got.data(), n, pool);
    MatMul(packed, whole.view(), expected.data(), n, pool);
    EXPECT_TRUE(SameBits(got, expected));
    MatVec(x.data(), 3, view, got.data(), n, pool);
    MatVec(x.data(), 3, whole.view(), expected.data(), n, pool);
    EXPECT_TRUE(SameBits(got, expected));
  }
}

TEST_P(MatMulTest, KeepsItsBufferForSmallerPacks) {
  ThreadPool pool(1);
  const std::vector<float> x = Normals(50 * 40, 1);
  PackedRows packed;
  packed.Pack(x.data(), 50, 40, 40, pool);
  const float* data = packed.data();
  packed.Pack(x.data(), 3, 40, 40, pool);
  packed.Pack(x.data(), 20, 80, 80, pool);
  EXPECT_EQ(packed.data(), data);
  EXPECT_EQ(packed.rows(), 20);
  EXPECT_EQ(packed.k(), 80);
  // Rows are padded to whole panels.
  EXPECT_GE(PackedRows::Bytes(50, 40), 50u * 40 * 4);
  EXPECT_LT(PackedRows::Bytes(50, 40), (50u + 16) * 40 * 4);
  EXPECT_EQ(PackedRows::Bytes(50, 40) % static_cast<uint64_t>(packed.panel_rows()), 0u);
}

TEST_P(MatMulTest, RefusesWhatDoesNotFit) {
  ThreadPool pool(1);
  const std::vector<float> x = Normals(12, 1);
  const StoredWeight w(Normals(6, 1), 2, 3, Dtype::kF32);
  float y[8];
  PackedRows packed;
  packed.Pack(x.data(), 3, 4, 4, pool);
  EXPECT_THROW(MatMul(packed, w.view(), y, 2, pool), RuntimeError);
  packed.Pack(x.data(), 4, 3, 3, pool);
  WeightMatrix integers = w.view();
  integers.dtype = Dtype::kI32;
  EXPECT_THROW(MatMul(packed, integers, y, 2, pool), RuntimeError);
  EXPECT_THROW(MatVec(x.data(), 4, integers, y, 2, pool), RuntimeError);
  for (const std::string& other : SupportedIsas()) {
    SelectIsa(GetParam());
    packed.Pack(x.data(), 4, 3, 3, pool);
    const int64_t panel_rows = packed.panel_rows();
    SelectIsa(other);
    PackedRows other_pack;
    other_pack.Pack(x.data(), 4, 3, 3, pool);
    if (other_pack.panel_rows() == panel_rows) continue;
    EXPECT_THROW(MatMul(packed, w.view(), y, 2, pool), RuntimeError) << other;
  }
}

TEST_P(MatMulTest, ReadsNothingPastTheEnds) {
  // StoredWeight and x end where readable memory ends.
  ThreadPool pool(1);
  for (const int64_t k : {1, 2, 3, 7, 9, 31, 33, 255, 261}) {
    for (const int64_t n : {1, 15, 18}) {
      const int64_t rows = 5;
      GuardedBytes x(static_cast<size_t>(rows * k) * sizeof(float));
      for (int64_t i = 0; i < rows * k; ++i) x.floats()[i] = 1;
      std::vector<float> y(static_cast<size_t>(rows * n));
      for (const Dtype dtype : kDtypes) {
        const StoredWeight w(std::vector<float>(static_cast<size_t>(n * k), 2), n, k, dtype);
        PackedRows packed;
        packed.Pack(x.floats(), rows, k, k, pool);
        MatMul(packed, w.view(), y.data(), n, pool);
        for (const float v : y) ASSERT_EQ(v, 2 * static_cast<float>(k));
        MatVec(x.floats(), rows, w.view(), y.data(), n, pool);
        for (const float v : y) ASSERT_EQ(v, 2 * static_cast<float>(k));
        packed.PackSwiGlu(x.floats(), x.floats(), rows, k, k, pool);
      }
    }
  }
}

TEST_P(MatMulTest, WidensEveryStoredValue) {
  // All 65536 patterns as W [1024, 64] against unit vectors: y is W transposed, bit by bit.
  ThreadPool pool(2);
  const int64_t n = 1024, k = 64;
  std::vector<float> identity(static_cast<size_t>(k * k));
  for (int64_t i = 0; i < k; ++i) identity[i * k + i] = 1;
  std::vector<uint16_t> patterns(65536);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
  for (const Dtype dtype : {Dtype::kBF16, Dtype::kF16}) {
    // Infinities and NaNs times 0 are NaN: left out here, tested below.
    const auto finite = [&](uint16_t bits) {
      return std::isfinite(dtype == Dtype::kBF16 ? FloatFromBf16(bits) : FloatFromF16(bits));
    };
    std::vector<uint16_t> stored = patterns;
    for (uint16_t& bits : stored) bits = finite(bits) ? bits : 0;
    const WeightMatrix w{.data = reinterpret_cast<const std::byte*>(stored.data()),
                         .rows = n,
                         .cols = k,
                         .dtype = dtype};
    const std::vector<float> y = Product(identity, k, w, pool);
    const std::vector<float> by_vec = VecProduct(identity, k, w, pool);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < k; ++c) {
        const float expected = LoadAsFloat(dtype, w.data, static_cast<size_t>(j * k + c));
        ASSERT_EQ(y[c * n + j], expected) << j << ", " << c;
        ASSERT_EQ(by_vec[c * n + j], expected) << j << ", " << c;
      }
    }
  }
}

TEST_P(MatMulTest, NotANumberStaysInItsRowAndColumn) {
  ThreadPool pool(1);
  const int64_t rows = 14, n = 35, k = 40;
  std::vector<float> x = Normals(rows * k, 1);
  std::vector<float> values = Normals(n * k, 2);
  x[8 * k + 39] = std::numeric_limits<float>::quiet_NaN();
  values[34 * k] = std::numeric_limits<float>::infinity();
  for (const Dtype dtype : kDtypes) {
    const StoredWeight w(values, n, k, dtype);
    for (const std::vector<float>& y :
         {Product(x, rows, w.view(), pool), VecProduct(x, rows, w.view(), pool)}) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          EXPECT_EQ(std::isfinite(y[i * n + j]), i != 8 && j != 34) << i << ", " << j;
        }
      }
    }
  }
}

// What PackSwiGlu stored, read back through a product with the identity.
std::vector<float> SwiGlu(const std::vector<float>& gate, const std::vector<float>& up,
                          int64_t rows, int64_t k, ThreadPool& pool) {
  std::vector<float> identity(static_cast<size_t>(k * k));
  for (int64_t i = 0; i < k; ++i) identity[i * k + i] = 1;
  const StoredWeight w(identity, k, k, Dtype::kF32);
  PackedRows packed;
  packed.PackSwiGlu(gate.data(), up.data(), rows, k, k, pool);
  std::vector<float> y(static_cast<size_t>(rows * k));
  MatMul(packed, w.view(), y.data(), k, pool);
  return y;
}

TEST_P(MatMulTest, SwiGluMatchesDouble) {
  ThreadPool pool(2);
  const int64_t rows = 23, k = 259;
  std::vector<float> gate = Normals(rows * k, 1);
  const std::vector<float> up = Normals(rows * k, 2);
  for (size_t i = 0; i < gate.size(); ++i) gate[i] *= static_cast<float>(i % 40);
  const std::vector<float> y = SwiGlu(gate, up, rows, k, pool);
  for (size_t i = 0; i < y.size(); ++i) {
    const double g = gate[i];
    const double expected = g / (1 + std::exp(-g)) * up[i];
    // exp is off by up to 2 units of 2^-23, and 4 more roundings: 6 * 1.2e-7 < 1e-6. Below -87 the
    // exponential is flushed: 1e-35 covers 100 * exp(-87).
    ASSERT_NEAR(y[i], expected, 1e-6 * std::fabs(expected) + 1e-35) << gate[i];
  }
}

TEST_P(MatMulTest, SwiGluAtTheCorners) {
  ThreadPool pool(1);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> gate = {0,     -0.0f,  100,       -100,          88, -88,
                                   1e30f, -1e30f, kInfinity, std::nanf(""), 1,  -87.3f};
  const int64_t k = static_cast<int64_t>(gate.size());
  const std::vector<float> up(gate.size(), 1.0f);
  PackedRows packed;
  packed.PackSwiGlu(gate.data(), up.data(), 1, k, k, pool);
  // One row: element c is at [c][0] of the only panel.
  const auto value = [&](int64_t c) { return packed.data()[c * packed.panel_rows()]; };
  EXPECT_EQ(value(0), 0);
  EXPECT_EQ(value(1), 0);
  EXPECT_EQ(value(2), 100);
  EXPECT_NEAR(value(3), 0, 1e-35);
  EXPECT_EQ(value(4), 88);
  EXPECT_NEAR(value(5), 0, 1e-35);
  EXPECT_EQ(value(6), 1e30f);
  EXPECT_EQ(value(7), 0);
  EXPECT_EQ(value(8), kInfinity);
  EXPECT_TRUE(std::isnan(value(9)));
  EXPECT_NEAR(value(10), 0.7310585786300049, 1e-6);  // 1 / (1 + exp(-1))
  EXPECT_NEAR(value(11), 0, 1e-35);
}

}  // namespace
}  // namespace winnow
