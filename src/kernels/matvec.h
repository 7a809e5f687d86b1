// Products for few rows of activations, where reading W is the cost: decoding. Many products share
// one call, so that all experts of a token are one set of tasks with one barrier.
//
// Promise (tests hold it bitwise, per ISA): an output element is the same sum in the same order
// whatever the number of rows, jobs or threads. The order is not MatMul's.
//
// Against packed weights activations become integers of 16 bits, 32 columns with one scale, so that
// the sums over 32 columns are exact whatever the instruction set; their error is 2^-16 of the
// largest of the 32.
#pragma once

#include <cstdint>
#include <span>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/thread_pool.h"       // ThreadPool
#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

// Rows of activations as the kernels read them, for as many products as need them. Prepared for the
// instruction set selected then. Grows on demand and is reused between calls.
class VectorRows {
 public:
  // Forgets the rows. Plain(), Packed(): for weights stored as such; both may be called with the
  // same x [rows, k] of stride `ld`, one does not undo the other.
  void Clear() { plain_rows_ = packed_rows_ = 0; }
  void Plain(const float* x, int64_t rows, int64_t k, int64_t ld);
  void Packed(const float* x, int64_t rows, int64_t k, int64_t ld);
  // Clear and whichever form `w` needs.
  void For(const WeightMatrix& w, const float* x, int64_t rows, int64_t k, int64_t ld) {
    Clear();
    w.packed.empty() ? Plain(x, rows, k, ld) : Packed(x, rows, k, ld);
  }

 private:
  friend void MatVec(std::span<const struct MatVecJob> jobs, ThreadPool& pool);
  int64_t plain_rows_ = 0, packed_rows_ = 0, plain_k_ = 0, packed_k_ = 0;
  bool vnni_ = false;                 // digits_ are bytes alone
  AlignedBuffer<float> interleaved_;  // as matvec.cc has it
  AlignedBuffer<std::byte> digits_;   // as packed_dot.h has it
  AlignedBuffer<float> scales_;       // [chunks, rows]
  AlignedBuffer<int32_t> sums_;       // [chunks, rows]
};

// y[i, j] = sum_k x[i, k] w[j, k] for all rows of x, prepared for w; y has row stride ld_y >=
// w.rows.
struct MatVecJob {
  const VectorRows* x = nullptr;
  const WeightMatrix* w = nullptr;
  float* y = nullptr;
  int64_t ld_y = 0;
};

// All jobs; their outputs do not overlap.
void MatVec(std::span<const MatVecJob> jobs, ThreadPool& pool);

// One product. x [rows, k] contiguous.
void MatVec(const float* x, int64_t rows, const WeightMatrix& w, float* y, int64_t ld_y,
            ThreadPool& pool);

}  // namespace winnow
