// Products with packed weights: against the values the format's reference gives.
#include <cmath>

#include "kernels/accumulate.h"
#include "kernels/bf16_tile.h"
#include "kernels/matmul.h"
#include "kernels/matvec.h"
#include "kernels/packed_dot.h"
#include "kernels/test_support.h"

namespace winnow {
namespace {

const std::vector<std::string> kFormats = {
    "8bit",           "7bit",         "6bit",          "5bit",          "4bit",
    "3bit",           "2bit",         "4bit-asym",     "4bit-log",      "4bit-curve",
    "3bit-curve",     "3bit-log",     "5bit-shift",    "8bit-shift",    "2bit-curve",
    "3bit-shift-g64", "2bit-log-g64", "4bit-asym-g64", "3bit-asym-g64", "6bit-g128"};

// A weight of random codes and scales, packed, at the end of readable memory.
class PackedWeight {
 public:
  PackedWeight(const std::string& format, int64_t rows, int64_t cols, uint32_t seed)
      : format_(*PackedFormatFromName(format)), bytes_(PackedBytes(format_, rows, cols)) {
    std::mt19937 random(seed);
    const auto groups =
        static_cast<size_t>((cols + format_.group_columns - 1) / format_.group_columns);
    std::vector<uint8_t> codes(static_cast<size_t>(cols));
    std::vector<uint16_t> scales(groups), minima(groups);
    for (int64_t row = 0; row < rows; ++row) {
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random() % (1u << format_.bits));
      for (uint16_t& s : scales) s = F16FromFloat((static_cast<float>(random() % 64) - 32) / 256);
      for (uint16_t& m : minima) m = F16FromFloat(-static_cast<float>(random() % 64) / 64);
      StorePackedRow(format_, cols, row, {codes.data(), scales.data(), minima.data()},
                     bytes_.data());
    }
    view_ = {
        .data = bytes_.data(), .rows = rows, .cols = cols, .dtype = Dtype::kU8, .packed = format_};
  }
  const WeightMatrix& view() const { return view_; }
  double at(int64_t row, int64_t col) const {
    return LoadPackedValue(format_, view_.cols, row, col, view_.data);
  }

 private:
  PackedFormat format_;
  GuardedBytes bytes_;
  WeightMatrix view_;
};

struct Sums {
  double exact = 0, magnitude = 0;
};
Sums Dot(const std::vector<float>& x, int64_t i, const PackedWeight& w, int64_t j) {
  Sums sums;
  for (int64_t c = 0; c < w.view().cols; ++c) {
    const double term = double{x[static_cast<size_t>(i * w.view().cols + c)]} * w.at(j, c);
    sums.exact += term;
    sums.magnitude += std::abs(term);
  }
  return sums;
}

class PackedTest : public EveryIsa {};

TEST_P(PackedTest, FewRowsGiveTheReferencesSums) {
  ThreadPool pool(2);
  for (const std::string& format : kFormats) {
    for (const auto& [num_rows, num_out, num_in] :
         {std::array<int64_t, 3>{1, 33, 64}, {3, 16, 100}, {15, 50, 257}}) {
      const int64_t rows = num_rows, n = num_out, k = num_in;
      const PackedWeight w(format, n, k, 3);
      const std::vector<float> x = Normals(rows * k, 4);
      std::vector<float> y(static_cast<size_t>(rows * n));
      MatVec(x.data(), rows, w.view(), y.data(), n, pool);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const Sums sums = Dot(x, i, w, j);
          // An activation is off by half of 1/32,512 of the largest of 32 (about 4 here), codes of
          // offset grids cancel against a sum as large as themselves, chunks are added in f32.
          double weights = 0;
          for (int64_t c = 0; c < k; ++c) weights += std::abs(w.at(j, c));
          EXPECT_NEAR(y[static_cast<size_t>(i * n + j)], sums.exact,
                      4.5 / 65024 * weights + 64 * kUnit * (sums.magnitude + 4 * weights))
              << format << " " << i << " " << j;
        }
      }
    }
  }
}

TEST_P(PackedTest, ARowDoesNotDependOnTheOthers) {
  for (const std::string& format : kFormats) {
    const int64_t rows = 15, n = 40, k = 200;
    const PackedWeight w(format, n, k, 5);
    const std::vector<float> x = Normals(rows * k, 6);
    ThreadPool one(1), three(3);
    std::vector<float> all(static_cast<size_t>(rows * n));
    MatVec(x.data(), rows, w.view(), all.data(), n, three);
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<float> alone(static_cast<size_t>(n));
      MatVec(x.data() + i * k, 1, w.view(), alone.data(), n, one);
      EXPECT_TRUE(
          SameBits(alone, std::vector<float>(all.begin() + i * n, all.begin() + (i + 1) * n)))
          << format << " " << i;
    }
  }
}

TEST_P(PackedTest, ManyRowsGiveTheBitsOfTheWidenedWeight) {
  ThreadPool pool(2);
  for (const std::string& format : kFormats) {
    for (const auto& [num_rows, num_out, num_in] :
         {std::array<int64_t, 3>{5, 33, 64}, {30, 48, 300}, {13, 7, 520}}) {
      // Lambdas may not capture parts of a structured binding.
      const int64_t rows = num_rows, n = num_out, k = num_in;
      const PackedWeight w(format, n, k, 7);
      std::vector<float> values;
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t c = 0; c < k; ++c) values.push_back(static_cast<float>(w.at(j, c)));
      }
      const StoredWeight widened(values, n, k, Dtype::kF32);
      const StoredWeight rounded(values, n, k, Dtype::kBF16);
      const std::vector<float> x = Normals(rows * k, 8), g = Normals(rows * n, 9);
      PackedRows packed, packed_g;
      packed.Pack(x.data(), rows, k, k, pool);
      packed_g.Pack(g.data(), rows, n, n, pool);
      const auto product = [&](const WeightMatrix& matrix, ComputePrecision precision) {
        std::vector<float> y(static_cast<size_t>(rows * n));
        MatMul(packed, matrix, y.data(), n, pool, precision);
        return y;
      };
      const auto transposed = [&](const WeightMatrix& matrix) {
        std::vector<float> y(static_cast<size_t>(rows * k));
        MatMulTransposed(packed_g, matrix, y.data(), k, pool);
        return y;
      };
      EXPECT_TRUE(SameBits(product(w.view(), ComputePrecision::kF32),
                           product(widened.view(), ComputePrecision::kF32)))
          << format;
      EXPECT_TRUE(SameBits(transposed(w.view()), transposed(widened.view()))) << format;
      if (Bf16DotsSelected()) {
        EXPECT_TRUE(SameBits(product(w.view(), ComputePrecision::kAuto),
                             product(rounded.view(), ComputePrecision::kAuto)))
            << format;
      }
    }
  }
}

TEST_P(PackedTest, JobsShareACall) {
  ThreadPool pool(3);
  const PackedWeight packed("4bit", 40, 96, 1);
  const StoredWeight plain(Normals(24 * 96, 2), 24, 96, Dtype::kBF16);
  const std::vector<float> x = Normals(2 * 96, 3);
  VectorRows rows;
  rows.Plain(x.data(), 2, 96, 96);
  rows.Packed(x.data(), 2, 96, 96);
  std::vector<float> a(80), b(48), a_alone(80), b_alone(48);
  const MatVecJob jobs[] = {{&rows, &packed.view(), a.data(), 40},
                            {&rows, &plain.view(), b.data(), 24}};
  MatVec(jobs, pool);
  MatVec(x.data(), 2, packed.view(), a_alone.data(), 40, pool);
  MatVec(x.data(), 2, plain.view(), b_alone.data(), 24, pool);
  EXPECT_TRUE(SameBits(a, a_alone));
  EXPECT_TRUE(SameBits(b, b_alone));
}

// Sums of a packed weight are those of its values.
TEST_P(PackedTest, MomentsAreThoseOfTheValues) {
  for (const std::string& format : kFormats) {
    const PackedWeight w(format, 21, 75, 3);
    double absolute = 0, square = 0, want_absolute = 0, want_square = 0;
    AccumulateMoments(w.view(), &absolute, &square);
    AccumulateMomentsReference(w.view(), &want_absolute, &want_square);
    EXPECT_NEAR(absolute, want_absolute, 1e-12 * want_absolute) << format;  // in another order
    // Squares are f32: exact for values of few bits, which a shift adds to.
    const double rounding = HasShift(w.view().packed) ? double{kUnit} : 1e-12;
    EXPECT_NEAR(square, want_square, rounding * want_square) << format;
  }
}

TEST_P(PackedTest, NanStaysInItsRow) {
  ThreadPool pool(1);
  const PackedWeight w("4bit", 16, 64, 1);
  std::vector<float> x = Normals(2 * 64, 3);
  x[70] = NAN;
  std::vector<float> y(32);
  MatVec(x.data(), 2, w.view(), y.data(), 16, pool);
  for (size_t j = 0; j < 16; ++j) {
    EXPECT_TRUE(std::isfinite(y[j]));
    EXPECT_TRUE(std::isnan(y[16 + j]));
  }
}

WINNOW_EVERY_ISA(PackedTest);

// AVX2, AVX-512 and VNNI add the same integers and the same f32s.
TEST(PackedDot, InstructionSetsAgreeBitForBit) {
  ThreadPool pool(1);
  for (const std::string& format : kFormats) {
    const PackedWeight w(format, 50, 257, 1);
    const std::vector<float> x = Normals(9 * 257, 3);
    std::vector<std::vector<float>> results;
    for (const std::string& isa : SupportedIsas()) {
      if (isa == "scalar") continue;  // rounds products and sums apart
      SelectIsa(isa);
      results.emplace_back(9 * 50);
      MatVec(x.data(), 9, w.view(), results.back().data(), 50, pool);
      EXPECT_TRUE(SameBits(results.back(), results.front())) << format << " " << isa;
    }
    SelectIsa(SupportedIsas().back());
  }
}

// Also where VNNI would never let the pairs of AVX-512 run.
TEST(PackedDot, VnniAndPairsAgreeBitForBit) {
  if (!VnniSelected()) GTEST_SKIP() << "no VNNI here";
  const int64_t rows = 9, n = 50, k = 257, chunks = 9 * ((k + 31) / 32);
  for (const std::string& format : kFormats) {
    const PackedWeight w(format, n, k, 1);
    const std::vector<float> x = Normals(rows * k, 3);
    std::vector<float> results[2];
    for (const DigitForm form : {DigitForm::kBytes, DigitForm::kPairsAndBytes}) {
      const bool vnni = form == DigitForm::kBytes;
      std::vector<std::byte> digits(static_cast<size_t>(chunks * DigitBytes(form)));
      std::vector<float> scales(static_cast<size_t>(chunks));
      std::vector<int32_t> sums(static_cast<size_t>(chunks));
      std::vector<float>& y = results[vnni ? 1 : 0];
      y.resize(static_cast<size_t>(rows * n));
      PackDigits(x.data(), rows, k, k, form, digits.data(), scales.data(), sums.data());
      const PackedDotTask task = {.digits = digits.data(),
                                  .scales = scales.data(),
                                  .sums = sums.data(),
                                  .rows = rows,
                                  .w = &w.view(),
                                  .y = y.data(),
                                  .ld_y = n,
                                  .first_block = 0,
                                  .end_block = 4};
      vnni ? RunPackedDotVnni(task) : RunPackedDotPairs(task);
    }
    EXPECT_TRUE(SameBits(results[0], results[1])) << format;
  }
}

}  // namespace
}  // namespace winnow
