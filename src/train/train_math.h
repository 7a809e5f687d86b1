// Small helpers the gradients share: buffers that grow, row loops, gradients of matrices and norms.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/thread_pool.h"       // ThreadPool
#include "kernels/matmul.h"         // PackedRows
#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

template <class T>
void GrowBuffer(AlignedBuffer<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) {
    buffer = AlignedBuffer<T>();  // freed before the new one is taken
    buffer = AlignedBuffer<T>(static_cast<size_t>(count));
  }
}

// Calls body(first, end) for row ranges in parallel.
template <class Body>
void ForRowRanges(ThreadPool& pool, int64_t n, const Body& body) {
  constexpr int64_t kRows = 32;
  pool.Run((n + kRows - 1) / kRows,
           [&](int64_t task, int) { body(task * kRows, std::min(n, (task + 1) * kRows)); });
}

inline WeightMatrix F32Matrix(const float* data, int64_t rows, int64_t cols,
                              int64_t row_stride = 0) {
  return {static_cast<const std::byte*>(static_cast<const void*>(data)), rows, cols, Dtype::kF32,
          row_stride};
}

// Products of gradients, with the scratch they need.
class GradientProducts {
 public:
  explicit GradientProducts(ThreadPool& pool) : pool_(pool) {}

  // d_x [rows, w.cols] = d_y [rows, w.rows] W.
  void Input(const float* d_y, int64_t rows, const WeightMatrix& w, float* d_x);
  // d_w [n, k] += d_y^T x, with d_y [rows, n] and x [rows, k].
  void Weight(const float* d_y, int64_t rows, int64_t n, const float* x, int64_t k, float* d_w);
  // d_b [n] += the sum of d_y's rows, in double.
  void Bias(const float* d_y, int64_t rows, int64_t n, float* d_b);
  // d_x += the gradient through a norm over `groups` parts of n of each row; d_weight may be null.
  void Norm(const float* x, int64_t rows, int64_t groups, int64_t n, std::span<const float> weight,
            float eps, const float* d_y, float* d_x, float* d_weight);

 private:
  ThreadPool& pool_;
  PackedRows packed_;
  AlignedBuffer<float> product_;
};

}  // namespace winnow
