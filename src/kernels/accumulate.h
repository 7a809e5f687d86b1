// Sums of rows in double, for statistics and eliminations: many rows into one, each element in row
// order.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/weight_matrix.h"  // WeightMatrix

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

// Over all elements of a matrix: absolute += sum |w|, square += sum w^2. The order of the sum
// depends on the instruction set.
void AccumulateMoments(const WeightMatrix& w, double* absolute, double* square);
void AccumulateMomentsReference(const WeightMatrix& w, double* absolute, double* square);

// x[i] -= a[0] * rows[0][first + i] + a[1] * rows[1][first + i] + ... for n columns, and y with b
// over the same rows unless y is null: each row is read once. Row by row in that order.
void SubtractScaledRows(std::span<const double* const> rows, int64_t first, const double* a,
                        const double* b, int64_t n, double* x, double* y);
void SubtractScaledRowsReference(std::span<const double* const> rows, int64_t first,
                                 const double* a, const double* b, int64_t n, double* x, double* y);

}  // namespace winnow
