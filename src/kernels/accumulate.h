// Sums of rows in double, for statistics: many rows into one, each element in row order.
#pragma once

#include <cstdint>

namespace winnow {

// sums[i] += x[0 * ld + i] + x[1 * ld + i] + ... (each widened to double, added in that order).
void AccumulateRows(double* sums, const float* x, int64_t rows, int64_t ld, int64_t n);
void AccumulateRowsReference(double* sums, const float* x, int64_t rows, int64_t ld, int64_t n);

// For a row of an expert's output f and its routing weight w:
// plain += f, weighted += w f, squared += w^2 f.
void AccumulateWeighted(double* plain, double* weighted, double* squared, double weight,
                        const float* x, int64_t n);
void AccumulateWeightedReference(double* plain, double* weighted, double* squared, double weight,
                                 const float* x, int64_t n);

}  // namespace winnow
