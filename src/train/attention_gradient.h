// The attention block of a layer forward with a record of what its derivative needs, and backward.
// Called by LayerGradient. The same formulas as forward/attention.h, and in addition keys that no
// query sees: a query whose keys are all hidden attends to every position of its row, later ones
// too, as the published DeepSeek code does with left padding (docs/METHODS.md).
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/thread_pool.h"       // ThreadPool
#include "forward/rope_table.h"     // RopeTable
#include "kernels/matmul.h"         // PackedRows, ComputePrecision
#include "model/model_config.h"     // ModelConfig
#include "train/gradient_slots.h"   // GradientSlots
#include "train/train_batch.h"      // TrainBatch
#include "train/train_math.h"       // GradientProducts
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

struct AttentionTape {
  AlignedBuffer<float> normed;        // [tokens, hidden]
  AlignedBuffer<float> q, k, v;       // [tokens, heads * head_dim], after RoPE
  AlignedBuffer<float> raw_q, raw_k;  // with a q/k norm: before it; `raw_v` with clipping
  AlignedBuffer<float> raw_v;
  AlignedBuffer<float> attended;  // [tokens, heads * head_dim]
};

class AttentionGradient {
 public:
  AttentionGradient(const ModelConfig& config, ThreadPool& pool, ComputePrecision precision);
  ~AttentionGradient();

  // after [tokens, hidden] = before + attention(norm(before)); they may not be the same.
  void Forward(const LayerWeights& weights, const TrainBatch& batch, const float* before,
               float* after, AttentionTape& tape);
  // From d_stream, the gradient of `after`, to that of `before` in place; left alone if neither the
  // input nor a weight below the scores needs it.
  void Backward(const LayerWeights& weights, const TrainBatch& batch, const float* before,
                const AttentionTape& tape, float* d_stream, const GradientSlots& slots,
                bool needs_input);

  static uint64_t TapeBytes(const ModelConfig& config, int64_t tokens);
  static uint64_t ScratchBytes(const ModelConfig& config, int64_t tokens, int64_t longest,
                               int num_threads);

 private:
  struct Scratch;  // one per thread
  struct Head;     // one (row, kv head) of work
  std::vector<Head> Heads(const TrainBatch& batch) const;
  void NormAndRotate(const LayerWeights& weights, const TrainBatch& batch, AttentionTape& tape);
  // Probabilities of queries [first, first + rows) of a head over `seen` keys.
  int64_t Probabilities(const Head& head, int64_t q_head, int64_t first, int64_t rows,
                        const AttentionTape& tape, Scratch& scratch) const;
  void Attend(const Head& head, AttentionTape& tape, int worker);
  void AttendBackward(const Head& head, const AttentionTape& tape, int worker);
  void UnrotateAndUnnorm(const LayerWeights& weights, const TrainBatch& batch,
                         const AttentionTape& tape, const GradientSlots& slots);
  bool keeps_raw() const { return config_.qk_norm != QkNorm::kNone || config_.clip_qkv; }

  const ModelConfig& config_;
  ThreadPool& pool_;
  const ComputePrecision precision_;
  RopeTable rope_;
  GradientProducts products_;
  PackedRows packed_;
  AlignedBuffer<float> projected_, d_attended_, d_q_, d_k_, d_v_, d_raw_, d_normed_, part_;
  std::vector<Scratch> scratch_;
};

}  // namespace winnow
