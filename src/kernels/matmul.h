// Dense products Y = X W^T for every layer of a model: X [rows, k] f32, W [n, k] as stored, Y
// [rows, n].
//
// Promise (tests hold it bitwise, per ISA): an output element is the same sum in the same order
// whatever the number of rows, threads or the partition of the work, so a token's result does not
// depend on which other tokens are computed with it.
//
// X is packed once (PackRows) and used by every product that reads it: gate and up of an expert
// share one pack, and tokens are gathered while packing. W is widened to f32 panel by panel in
// cache, so bf16 weights run at f32 speed on CPUs without bf16 instructions.
#pragma once

#include <cstdint>
#include <span>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/thread_pool.h"       // ThreadPool
#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

// Rows of activations in the layout the product kernels read (packed_rows.cc): blocks of columns,
// in a block panels of panel_rows() rows, [columns][panel rows], zero-padded. Packed for the
// instruction set selected then. Grows on demand and is reused between calls.
class PackedRows {
 public:
  // Rows of x [*, k] with stride `ld`, in order.
  void Pack(const float* x, int64_t rows, int64_t k, int64_t ld, ThreadPool& pool);
  // Rows x[index[i]], the gather of an expert's tokens.
  void PackGathered(const float* x, std::span<const int32_t> index, int64_t k, int64_t ld,
                    ThreadPool& pool);
  // silu(gate) * up, element by element, both [rows, k] with stride ld: the input of a down
  // projection.
  void PackSwiGlu(const float* gate, const float* up, int64_t rows, int64_t k, int64_t ld,
                  ThreadPool& pool);

  // The columns of x [k, rows] with stride `ld` as rows: X^T, for gradients of weights.
  void PackTransposed(const float* x, int64_t rows, int64_t k, int64_t ld, ThreadPool& pool);

  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  int64_t panel_rows() const { return panel_rows_; }
  const float* data() const { return buffer_.data(); }
  // Bytes a pack of this size holds, for memory plans.
  static uint64_t Bytes(int64_t rows, int64_t k);

 private:
  void Reserve(int64_t rows, int64_t k);
  AlignedBuffer<float> buffer_;
  int64_t rows_ = 0;
  int64_t k_ = 0;
  int64_t panel_rows_ = 0;
};

enum class ComputePrecision {
  // Activations stay f32, as in the reference implementations in f32.
  kF32,
  // Against bf16 and packed weights activations (and what packed weights stand for) are rounded to
  // bf16 (8 bits of precision) where "avx512_bf16"
  // is the instruction set in use: products of pairs at twice the rate. Everywhere else as kF32.
  kAuto,
};

// y[i, j] = sum_k x[i, k] w[j, k]; y has row stride ld_y >= w.rows. Overwrites y. The promise of
// the file's head holds for each precision.
void MatMul(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y, ThreadPool& pool,
            ComputePrecision precision = ComputePrecision::kF32);

// MatMul in f32 for one caller thread, for use inside a task of a pool (attention heads).
void MatMulSingle(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y);

// Y = X W, for gradients: y[i, j] = sum_r x[i, r] w[r, j], W [k, n] as stored, so that neither W
// nor activations are transposed in memory. Always f32. The second form is for a task of a pool.
void MatMulTransposed(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y,
                      ThreadPool& pool);
void MatMulTransposedSingle(const PackedRows& x, const WeightMatrix& w, float* y, int64_t ld_y);

// Plain double-precision reference of both, for tests.
void MatMulReference(const float* x, int64_t rows, int64_t ld_x, const WeightMatrix& w, float* y,
                     int64_t ld_y);

}  // namespace winnow
