// Sums of rows: equal to the reference bit for bit, because every element is added in the same
// order.
#include "kernels/accumulate.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/targets.h"

namespace winnow {
namespace {

TEST(Accumulate, EqualsTheReferenceOnEveryInstructionSet) {
  for (const std::string& isa : SupportedIsas()) {
    SelectIsa(isa);
    for (const int64_t n : {1, 3, 7, 16, 17, 64, 100}) {
      for (const int64_t rows : {0, 1, 5, 33}) {
        const int64_t ld = n + 3;
        std::vector<float> x(static_cast<size_t>(rows * ld + n));
        for (size_t i = 0; i < x.size(); ++i) {
          x[i] = static_cast<float>((i * 2654435761u) % 1000) * 0.37f - 100.0f;
        }
        std::vector<double> got(static_cast<size_t>(n), 0.25), want = got;
        AccumulateRows(got.data(), x.data(), rows, ld, n);
        AccumulateRowsReference(want.data(), x.data(), rows, ld, n);
        EXPECT_EQ(got, want) << isa << " n " << n << " rows " << rows;
        std::vector<double> a(got), b(got), c(got), ra(got), rb(got), rc(got);
        AccumulateWeighted(a.data(), b.data(), c.data(), 0.3, x.data(), n);
        AccumulateWeightedReference(ra.data(), rb.data(), rc.data(), 0.3, x.data(), n);
        EXPECT_EQ(a, ra);
        EXPECT_EQ(b, rb);
        EXPECT_EQ(c, rc);
      }
    }
  }
}

// The scalar build rounds products before it takes them off, the others do not: 2^-52 of each.
TEST(Accumulate, SubtractsScaledRows) {
  for (const std::string& isa : SupportedIsas()) {
    SelectIsa(isa);
    for (const int64_t n : {1, 3, 8, 17, 100}) {
      for (const size_t num_rows : {0u, 1u, 3u, 4u, 9u}) {
        const int64_t first = 2;
        std::vector<double> values(num_rows * static_cast<size_t>(first + n)), a, b;
        for (size_t i = 0; i < values.size(); ++i) {
          values[i] = static_cast<double>((i * 2654435761u) % 1000) * 0.037 - 18.0;
        }
        std::vector<const double*> rows;
        for (size_t r = 0; r < num_rows; ++r) {
          rows.push_back(values.data() + r * static_cast<size_t>(first + n));
          a.push_back(0.3 - 0.1 * static_cast<double>(r));
          b.push_back(0.7 * static_cast<double>(r) - 1.1);
        }
        std::vector<double> x(static_cast<size_t>(n), 0.25), y(static_cast<size_t>(n), -3.0);
        std::vector<double> want_x = x, want_y = y, alone = x;
        SubtractScaledRows(rows, first, a.data(), b.data(), n, x.data(), y.data());
        SubtractScaledRowsReference(rows, first, a.data(), b.data(), n, want_x.data(),
                                    want_y.data());
        SubtractScaledRows(rows, first, a.data(), nullptr, n, alone.data(), nullptr);
        for (size_t i = 0; i < x.size(); ++i) {
          EXPECT_NEAR(x[i], want_x[i], 1e-13) << isa << " n " << n << " rows " << num_rows;
          EXPECT_NEAR(y[i], want_y[i], 1e-13) << isa << " n " << n << " rows " << num_rows;
        }
        EXPECT_EQ(alone, x);
      }
    }
  }
}

// 1e-6: squares are rounded to f32 before they are added, at random.
TEST(Accumulate, MomentsOfWeightsInEveryType) {
  for (const std::string& isa : SupportedIsas()) {
    SelectIsa(isa);
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16}) {
      const size_t element = DtypeBits(dtype) / 8;
      std::vector<std::byte> bytes(5 * 37 * element);
      for (size_t i = 0; i < 5 * 37; ++i) {
        const float value = static_cast<float>((i * 2654435761u) % 1000) * 0.002f - 1.0f;
        StoreFloat(dtype, value, bytes.data(), i);
      }
      const WeightMatrix w{bytes.data(), 5, 37, dtype};
      double absolute = 0, square = 0, want_absolute = 0, want_square = 0;
      AccumulateMoments(w, &absolute, &square);
      AccumulateMomentsReference(w, &want_absolute, &want_square);
      EXPECT_GT(want_absolute, 10.0);
      EXPECT_NEAR(absolute, want_absolute, 1e-6 * want_absolute) << isa;
      EXPECT_NEAR(square, want_square, 1e-6 * want_square) << isa;
    }
  }
}

}  // namespace
}  // namespace winnow
