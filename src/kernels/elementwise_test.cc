#include "kernels/elementwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "kernels/test_support.h"

namespace winnow {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class ElementwiseTest : public EveryIsa {};
WINNOW_EVERY_ISA(ElementwiseTest);

TEST_P(ElementwiseTest, RmsNormMatchesItsReference) {
  for (const int64_t n : kSizes) {
    const int64_t rows = 3, ld_x = n + 2, ld_y = n + 5;
    const std::vector<float> x = Normals(rows * ld_x, 1);
    const std::vector<float> weight = Normals(n, 2);
    std::vector<float> y(static_cast<size_t>(rows * ld_y), 5.0f);
    std::vector<float> expected = y;
    RmsNorm(x.data(), rows, n, ld_x, weight.data(), 1e-5f, y.data(), ld_y);
    RmsNormReference(x.data(), rows, n, ld_x, weight.data(), 1e-5f, expected.data(), ld_y);
    for (size_t i = 0; i < y.size(); ++i) {
      // The sum of n squares is off by n units at most, its root by half of that; 4 more roundings.
      const double bound = (static_cast<double>(n) / 2 + 6) * kUnit * std::fabs(expected[i]);
      ASSERT_NEAR(y[i], expected[i], bound) << n << " " << i;
    }
    std::vector<float> in_place = x;
    RmsNorm(in_place.data(), rows, n, ld_x, weight.data(), 1e-5f, in_place.data(), ld_x);
    for (int64_t i = 0; i < rows; ++i) {
      EXPECT_EQ(std::memcmp(&in_place[i * ld_x], &y[i * ld_y], n * sizeof(float)), 0);
    }
  }
}

TEST(RmsNormReferenceTest, ByHand) {
  // mean of squares of (3, 4) is 12.5; with eps 3.5 the root is 4.
  const float x[2] = {3, 4}, weight[2] = {2, 10};
  float y[2];
  RmsNormReference(x, 1, 2, 2, weight, 3.5f, y, 2);
  EXPECT_EQ(y[0], 1.5f);
  EXPECT_EQ(y[1], 10.0f);
}

TEST_P(ElementwiseTest, AdditionsAreExactOnWholeNumbers) {
  for (const int64_t n : kSizes) {
    const std::vector<float> x = SmallIntegers(n, 1);
    const std::vector<float> y = SmallIntegers(n, 2);
    std::vector<float> sum = x;
    std::vector<float> scaled = x;
    std::vector<double> doubles(x.begin(), x.end());
    AddInPlace(sum.data(), y.data(), n);
    AddScaled(scaled.data(), -0.5f, y.data(), n);
    AccumulateDouble(doubles.data(), 3.0, y.data(), n);
    float dot = 0;
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(sum[i], x[i] + y[i]);
      ASSERT_EQ(scaled[i], x[i] - 0.5f * y[i]);
      ASSERT_EQ(doubles[i], x[i] + 3.0 * y[i]);
      dot += x[i] * y[i];
    }
    EXPECT_EQ(Dot(x.data(), y.data(), n), dot);
  }
  EXPECT_EQ(Dot(nullptr, nullptr, 0), 0.0f);
}

TEST_P(ElementwiseTest, AddInPlaceRoundsOnce) {
  const std::vector<float> y = Normals(100, 2);
  const std::vector<float> x = Normals(100, 1);
  std::vector<float> sum = x;
  AddInPlace(sum.data(), y.data(), 100);
  for (size_t i = 0; i < 100; ++i) EXPECT_EQ(sum[i], x[i] + y[i]);
}

TEST_P(ElementwiseTest, LargestMagnitudeOfEveryLength) {
  for (const int64_t n : {0, 1, 7, 16, 33, 100}) {
    std::vector<float> x(static_cast<size_t>(n));
    float largest = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = static_cast<float>((i * 2654435761u) % 1000) * 0.01f - 6.0f;
      largest = std::max(largest, std::abs(x[i]));
    }
    EXPECT_EQ(LargestMagnitude(x.data(), n), largest) << n;
  }
}

TEST_P(ElementwiseTest, DotStaysWithinTheRoundingBound) {
  for (const int64_t n : kSizes) {
    const std::vector<float> a = Normals(n, 1);
    const std::vector<float> b = Normals(n, 2);
    double sum = 0;
    double magnitude = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += static_cast<double>(a[i]) * b[i];
      magnitude += std::fabs(static_cast<double>(a[i]) * b[i]);
    }
    EXPECT_NEAR(Dot(a.data(), b.data(), n), sum, static_cast<double>(2 * n) * kUnit * magnitude);
  }
}

// The same bits on every instruction set: the only kernel that promises that.
TEST_P(ElementwiseTest, AccumulateDoubleRoundsProductAndSumSeparately) {
  const std::vector<float> x = Normals(300, 1);
  std::vector<double> sums(300, 0.1);
  AccumulateDouble(sums.data(), 0.3, x.data(), 300);
  for (size_t i = 0; i < 300; ++i) {
    volatile double product = 0.3 * static_cast<double>(x[i]);  // no FMA here either
    EXPECT_EQ(sums[i], 0.1 + product);
  }
}

TEST_P(ElementwiseTest, SoftmaxMatchesItsReference) {
  for (const int64_t n : kSizes) {
    const int64_t rows = 3, ld = n + 3;
    std::vector<float> x = Normals(rows * ld, 1);
    for (size_t i = 0; i < x.size(); ++i) x[i] *= static_cast<float>(1 + i % 30);
    std::vector<float> expected = x;
    Softmax(x.data(), rows, n, ld);
    SoftmaxReference(expected.data(), rows, n, ld);
    for (int64_t i = 0; i < rows; ++i) {
      double total = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double want = expected[i * ld + j];
        // Differences up to 150 are rounded to 2^-24 * 150 before exp: relative 9e-6.
        ASSERT_NEAR(x[i * ld + j], want, 1e-5 * want + 1e-37) << n;
        total += x[i * ld + j];
      }
      EXPECT_NEAR(total, 1, static_cast<double>(n + 4) * kUnit);
      for (int64_t j = n; j < ld; ++j) EXPECT_EQ(x[i * ld + j], expected[i * ld + j]);
    }
  }
}

TEST_P(ElementwiseTest, SoftmaxOfKnownValues) {
  float x[4] = {std::log(1.0f), std::log(2.0f), std::log(5.0f), -kInfinity};
  Softmax(x, 1, 4, 4);
  EXPECT_NEAR(x[0], 0.125, 1e-7);  // a few units of 2^-24
  EXPECT_NEAR(x[1], 0.25, 2e-7);
  EXPECT_NEAR(x[2], 0.625, 4e-7);
  EXPECT_EQ(x[3], 0);
  float one[1] = {-1000};
  Softmax(one, 1, 1, 1);
  EXPECT_EQ(one[0], 1);
  Softmax(one, 0, 1, 1);
  Softmax(one, 1, 0, 0);
  EXPECT_EQ(one[0], 1);
}

TEST_P(ElementwiseTest, SoftmaxKeepsNotANumber) {
  for (const size_t at : {size_t{0}, size_t{5}, size_t{8}, size_t{16}}) {
    std::vector<float> x = Normals(17, 1);
    x[at] = std::nanf("");
    Softmax(x.data(), 1, 17, 17);
    for (const float v : x) EXPECT_TRUE(std::isnan(v)) << at;
    std::vector<float> y = Normals(17, 1);
    y[at] = std::nanf("");
    EXPECT_TRUE(std::isnan(LogSumExp(y.data(), 17))) << at;
  }
}

TEST_P(ElementwiseTest, LogSumExpMatchesDouble) {
  for (const int64_t n : kSizes) {
    std::vector<float> x = Normals(n, 1);
    for (float& v : x) v = 5 * v + 300;  // exp(300) overflows f32
    double sum = 0;
    for (const float v : x) sum += std::exp(static_cast<double>(v) - 300);
    // exp of each is off by at most 3e-7 relative, plus the rounding of v - max (up to 50 * 2^-24).
    EXPECT_NEAR(LogSumExp(x.data(), n), 300 + std::log(sum), 4e-6) << n;
  }
  const std::vector<float> equal(1000, -7.5f);
  EXPECT_NEAR(LogSumExp(equal.data(), 1000), -7.5 + std::log(1000.0), 1e-12);
  const float minus[3] = {-kInfinity, -kInfinity, -kInfinity};
  EXPECT_EQ(LogSumExp(minus, 3), -kInfinity);
  const float plus[3] = {0, kInfinity, 1};
  EXPECT_EQ(LogSumExp(plus, 3), kInfinity);
  EXPECT_EQ(LogSumExp(plus, 0), -kInfinity);
}

TEST_P(ElementwiseTest, RopeRotatesHalves) {
  for (const auto& [head_dim, half] : std::vector<std::pair<int64_t, int64_t>>{
           {2, 1}, {8, 4}, {16, 8}, {64, 32}, {128, 64}, {10, 3}, {40, 17}}) {
    const int64_t heads = 3;
    const std::vector<float> before = Normals(heads * head_dim, 1);
    std::vector<float> cos(static_cast<size_t>(half));
    std::vector<float> sin(static_cast<size_t>(half));
    for (int64_t i = 0; i < half; ++i) {
      cos[i] = std::cos(0.7f * static_cast<float>(i + 1));
      sin[i] = std::sin(0.7f * static_cast<float>(i + 1));
    }
    std::vector<float> x = before;
    RopeHalf(x.data(), heads, head_dim, half, cos.data(), sin.data());
    for (int64_t h = 0; h < heads; ++h) {
      const float* a = &before[h * head_dim];
      for (int64_t i = 0; i < head_dim; ++i) {
        double want = a[i];  // beyond 2 * half nothing moves
        double magnitude = 0;
        if (i < 2 * half) {
          const int64_t j = i % half;
          const double other = i < half ? -a[i + half] : a[i - half];
          want = static_cast<double>(a[i]) * cos[j] + other * sin[j];
          magnitude = std::fabs(a[i]) + std::fabs(other);
        }
        ASSERT_NEAR(x[h * head_dim + i], want, 2 * kUnit * magnitude) << head_dim << " " << i;
      }
    }
  }
  // A quarter turn of (1, 2) in the plane of dimensions 0 and 2.
  float x[4] = {1, 7, 2, 8};
  const float cos[2] = {0, 1}, sin[2] = {1, 0};
  RopeHalf(x, 1, 4, 2, cos, sin);
  EXPECT_EQ(x[0], -2);
  EXPECT_EQ(x[1], 7);
  EXPECT_EQ(x[2], 1);
  EXPECT_EQ(x[3], 8);
}

TEST_P(ElementwiseTest, WidenRowIsExact) {
  for (const Dtype dtype : {Dtype::kBF16, Dtype::kF16}) {
    std::vector<uint16_t> stored(65536);
    for (size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<uint16_t>(i);
    const WeightMatrix w{.data = reinterpret_cast<const std::byte*>(stored.data()),
                         .rows = 256,
                         .cols = 256,
                         .dtype = dtype};
    float row[256];
    for (int64_t r = 0; r < 256; ++r) {
      WidenRow(w, r, row);
      for (int64_t c = 0; c < 256; ++c) {
        const float want = LoadAsFloat(dtype, w.data, static_cast<size_t>(r * 256 + c));
        if (std::isnan(want)) {
          ASSERT_TRUE(std::isnan(row[c]));
        } else {
          ASSERT_EQ(std::memcmp(&row[c], &want, 4), 0) << r << " " << c;
        }
      }
    }
  }
  for (const int64_t n : kSizes) {
    for (const Dtype dtype : kDtypes) {
      const StoredWeight w(Normals(2 * n, 3), 2, n, dtype);
      std::vector<float> row(static_cast<size_t>(n + 1), 9.0f);
      WidenRow(w.view(), 1, row.data());
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(row[i], w.at(1, i));
      EXPECT_EQ(row[n], 9.0f);
    }
  }
}

TEST_P(ElementwiseTest, GramIsExactOnWholeNumbers) {
  for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 64}) {
    for (const int64_t n : {1, 7, 8, 16, 33, 128, 513, 1100}) {
      const int64_t ld = n + 1;
      const std::vector<float> f = SmallIntegers(m * ld, 1);
      std::vector<float> gram(static_cast<size_t>(m * (m + 1) / 2 + 1), -1.5f);
      GramUpper(f.data(), m, n, ld, gram.data());
      size_t pair = 0;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = i; j < m; ++j, ++pair) {
          float sum = 0;
          for (int64_t c = 0; c < n; ++c) sum += f[i * ld + c] * f[j * ld + c];
          ASSERT_EQ(gram[pair], sum) << m << " x " << n << ": " << i << ", " << j;
        }
      }
      EXPECT_EQ(gram[pair], -1.5f);
    }
  }
}

TEST_P(ElementwiseTest, GramMatchesItsReference) {
  const int64_t m = 21, n = 1500;
  const std::vector<float> f = Normals(m * n, 2);
  std::vector<float> gram(m * (m + 1) / 2);
  std::vector<float> expected(gram.size());
  GramUpper(f.data(), m, n, n, gram.data());
  GramUpperReference(f.data(), m, n, n, expected.data());
  // sum |f_i f_j| <= |f_i| |f_j|, about n for standard normals; 1.2 n is above all of them here.
  for (size_t i = 0; i < gram.size(); ++i) {
    EXPECT_NEAR(gram[i], expected[i], static_cast<double>(2 * n) * kUnit * 1.2 * n);
  }
  EXPECT_LT(*std::max_element(expected.begin(), expected.end()), 1.2 * n);
}

// Every pair is summed alike, so equal vectors have equal entries wherever they stand.
TEST_P(ElementwiseTest, GramTreatsPairsAlike) {
  const int64_t m = 13, n = 777;
  const std::vector<float> one = Normals(n, 3);
  std::vector<float> f;
  for (int64_t i = 0; i < m; ++i) f.insert(f.end(), one.begin(), one.end());
  std::vector<float> gram(m * (m + 1) / 2);
  GramUpper(f.data(), m, n, n, gram.data());
  for (const float g : gram) EXPECT_EQ(g, gram[0]);
}

TEST(TargetsTest, NamesAndSelection) {
  const std::vector<std::string> isas = SupportedIsas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), "scalar");
  EXPECT_EQ(ActiveIsa(), isas.back());
  for (const std::string& isa : isas) {
    SelectIsa(isa);
    EXPECT_EQ(ActiveIsa(), isa);
  }
  EXPECT_THROW(SelectIsa("mmx"), UsageError);
  EXPECT_THROW(SelectIsa(""), UsageError);
  EXPECT_EQ(ActiveIsa(), isas.back());
}

}  // namespace
}  // namespace winnow
