// Inverse of a symmetric positive definite matrix in double, for ridge regressions and compensated
// rounding: Cholesky factor, its inverse, and the product of the two, in blocks of 64 so that
// nearly all of the work is one register-tiled product.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"  // ThreadPool

namespace winnow {

// Replaces `a` [n, n] (row-major, symmetric; only the lower triangle is read) by its inverse, both
// triangles filled. False if a pivot is not positive: `a` is then undefined. The same bytes for any
// number of threads.
bool InvertPositiveDefinite(double* a, int64_t n, ThreadPool& pool);
// Replaces `a` = L L^T by L^-1, lower triangular, zeros above the diagonal: the inverse as factors,
// a^-1 = L^-T L^-1. Otherwise as above.
bool InverseCholeskyFactor(double* a, int64_t n, ThreadPool& pool);
// Gauss-Jordan without pivoting, for tests.
bool InvertPositiveDefiniteReference(double* a, int64_t n);

}  // namespace winnow
