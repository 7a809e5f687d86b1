// Row-wise operations of a decoder layer. All take f32 rows; sums inside a row are in a fixed
// order. Those with sums have a scalar double reference (suffix Reference) that tests compare with.
// NaN and infinities come out where the formula has them, so that a broken activation stays
// visible.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

// y[i, :] = w * x[i, :] / sqrt(mean(x[i, :]^2) + eps), rows of n with strides ld_x, ld_y; w f32
// [n]. x and y may be the same.
void RmsNorm(const float* x, int64_t rows, int64_t n, int64_t ld_x, const float* weight, float eps,
             float* y, int64_t ld_y);
void RmsNormReference(const float* x, int64_t rows, int64_t n, int64_t ld_x, const float* weight,
                      float eps, float* y, int64_t ld_y);

// x[i] += y[i].
void AddInPlace(float* x, const float* y, int64_t n);
// x[i] += scale * y[i].
void AddScaled(float* x, float scale, const float* y, int64_t n);
// out = a . b, f32 products summed in four vectors, then across lanes in a fixed order.
float Dot(const float* a, const float* b, int64_t n);

// The largest |x[i]|, 0 if n is 0.
float LargestMagnitude(const float* x, int64_t n);

// out[i] = silu(gate[i]) * up[i], as PackSwiGlu computes it.
void SwiGlu(const float* gate, const float* up, int64_t n, float* out);

// Softmax over each of `rows` rows of n in place (max subtracted, f32), stride ld.
void Softmax(float* x, int64_t rows, int64_t n, int64_t ld);
void SoftmaxReference(float* x, int64_t rows, int64_t n, int64_t ld);

// log(sum(exp(x))) over n values, sum in double.
double LogSumExp(const float* x, int64_t n);

// Half-rotation RoPE ("rotate_half" in the reference code): the first 2 * half of each head's
// head_dim values; cos, sin [half] of this position. x [num_heads, head_dim].
void RopeHalf(float* x, int64_t num_heads, int64_t head_dim, int64_t half, const float* cos,
              const float* sin);

// widened[i] = w[row, i] as f32.
void WidenRow(const WeightMatrix& w, int64_t row, float* out);

// Gram of m vectors of length n stored as rows of f [m, n] (stride ld): writes the upper triangle
// row by row, g[i * m - i * (i - 1) / 2 + (j - i)] = f_i . f_j for j >= i. f32, every pair
// summed in the same order, which n alone fixes.
void GramUpper(const float* f, int64_t m, int64_t n, int64_t ld, float* gram);
void GramUpperReference(const float* f, int64_t m, int64_t n, int64_t ld, float* gram);

// sums[i] += scale * x[i], x widened to double.
void AccumulateDouble(double* sums, double scale, const float* x, int64_t n);

}  // namespace winnow
