// Second moments of what a matrix multiplies: the sum of a x x^T over rows x with weights a.
// Products in f32 over at most kMomentRows rows, sums of them in double, so that they do not depend
// on how the rows were handed over beyond that cut.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"  // ThreadPool
#include "kernels/matmul.h"    // PackedRows

namespace winnow {

inline constexpr int64_t kMomentRows = 1024;

class InputMoments {
 public:
  explicit InputMoments(int64_t cols);

  // x [rows, cols], rows <= kMomentRows; weight [rows], not negative.
  void Add(const float* x, const float* weight, int64_t rows, ThreadPool& pool);

  int64_t cols() const { return cols_; }
  std::span<const double> sum() const { return sum_; }
  // How many equally weighted rows say as much: (sum of a)^2 / sum of a^2.
  double EffectiveRows() const;
  // EffectiveRows() times the mean moments, plus `prior_rows` times the mean of `prior` (or null):
  // an expert that saw few tokens leans on what its layer saw. [cols, cols]; this object is spent.
  std::vector<double> TakeBlended(const InputMoments* prior, double prior_rows);

  // What one of them holds, work included.
  static uint64_t Bytes(int64_t cols);

 private:
  int64_t cols_;
  std::vector<double> sum_;  // [cols, cols]
  double weight_ = 0, weight_squared_ = 0;
  std::vector<float> scaled_, product_;
  PackedRows packed_;
};

}  // namespace winnow
