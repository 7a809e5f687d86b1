// From the stream after the last layer to the loss and back: final norm, lm_head, cross entropy of
// the next token, and the Kullback-Leibler divergence from a teacher's logits. A block of tokens at
// a time, so that [tokens, vocab_size] is never held. Used by TrainRun for steps and for held-out
// rows.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"  // AlignedBuffer
#include "base/thread_pool.h"     // ThreadPool
#include "kernels/matmul.h"       // PackedRows
#include "model/model.h"          // Model
#include "train/train_batch.h"    // TrainBatch
#include "train/train_math.h"     // GradientProducts

namespace winnow {

// The end of a model: what turns a stream into logits.
struct OutputHead {
  std::vector<float> norm;  // [hidden]
  WeightMatrix lm_head;     // [V, hidden]
  float eps = 1e-6f;
};

// Sums over scored tokens, each times what it counts for.
struct LossSums {
  double cross_entropy = 0;
  double divergence = 0;  // KL(teacher || student)
  double weight = 0;
};

struct OutputLossCall {
  const TrainBatch* batch = nullptr;
  const float* stream = nullptr;  // [tokens, hidden]
  // With a teacher: its head and stream; `divergence_share` of the gradient is KL's, the rest cross
  // entropy's.
  const OutputHead* teacher = nullptr;
  const float* teacher_stream = nullptr;
  double divergence_share = 0;
  double scale = 0;           // of the gradient: 1 / weight of the whole step
  float* d_stream = nullptr;  // [tokens, hidden], overwritten; null: the loss alone
  float* d_norm = nullptr;    // added to; may be null
};

class OutputLoss {
 public:
  OutputLoss(int64_t hidden, int64_t vocab_size, ThreadPool& pool);
  LossSums Run(const OutputHead& head, const OutputLossCall& call);

  static uint64_t ScratchBytes(int64_t hidden, int64_t vocab_size, bool teacher);

 private:
  static int64_t BlockTokens(int64_t vocab_size);
  void Logits(const OutputHead& head, const float* stream, int64_t hidden, int64_t rows,
              AlignedBuffer<float>& logits);

  const int64_t hidden_, vocab_size_;
  ThreadPool& pool_;
  GradientProducts products_;
  PackedRows packed_;
  AlignedBuffer<float> normed_, d_normed_, logits_, teacher_logits_;
};

}  // namespace winnow
