// The feed-forward block of a layer forward with a record of what its derivative needs, and
// backward. Called by LayerGradient. Dense, shared, routed and condensed parts are one thing here:
// a part adds c * f(x) for some tokens, where c is 1, a constant, a sigmoid gate or a routing
// weight.
//
// Routing: which experts a token uses is fixed; the gradient flows through their weights into the
// router and its input. The balance loss of the DeepSeek code may be added for MoE layers.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/thread_pool.h"       // ThreadPool
#include "kernels/matmul.h"         // PackedRows, ComputePrecision
#include "model/model_config.h"     // ModelConfig
#include "train/gradient_slots.h"   // GradientSlots
#include "train/train_batch.h"      // TrainBatch
#include "train/train_math.h"       // GradientProducts
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

// alpha * mean over rows of sum_e (selections of e / (T k / E)) * mean_t score(t, e), or with
// `by_row` false the same over all tokens at once. Its value is no part of the loss.
struct BalanceLoss {
  double alpha = 0;
  bool by_row = true;
  int64_t rows = 0;    // of the whole batch, of which the rows at hand may be a part
  int64_t tokens = 0;  // likewise
};

enum class PartKind : uint8_t { kDense, kShared, kExpert };

struct FeedForwardPart {
  PartKind kind = PartKind::kDense;
  int32_t expert = 0;
  std::vector<int32_t> tokens;  // ascending; empty: all
  std::vector<int64_t> slots;   // of routed tokens: token * k + rank
  int64_t rows = 0;
  int64_t offset = 0;  // of its rows in gate and up
  int64_t width = 0;
};

struct FeedForwardTape {
  AlignedBuffer<float> normed;         // [tokens, hidden]
  AlignedBuffer<float> probabilities;  // [tokens, E], MoE layers
  AlignedBuffer<int32_t> ids;          // [tokens, k]
  AlignedBuffer<float> routing;        // [tokens, k]
  AlignedBuffer<float> shared_gate;    // [tokens], after the sigmoid
  AlignedBuffer<float> gate, up;       // of all parts, one after the other
  std::vector<FeedForwardPart> parts;
};

class FeedForwardGradient {
 public:
  FeedForwardGradient(const ModelConfig& config, ThreadPool& pool, ComputePrecision precision);

  // stream [tokens, hidden] += block(norm(middle)); null: only the tape is made.
  void Forward(const LayerWeights& weights, int64_t n, const float* middle, float* stream,
               FeedForwardTape& tape);
  // From d_stream, the gradient after the block, to that before it in place (`stream` is what the
  // block read), if needs_input.
  void Backward(const LayerWeights& weights, const TrainBatch& batch, const float* stream,
                const FeedForwardTape& tape, const BalanceLoss& balance, float* d_stream,
                const GradientSlots& slots, bool needs_input);

  static uint64_t TapeBytes(const ModelConfig& config, const LayerConfig& layer, int64_t tokens);
  static uint64_t ScratchBytes(const ModelConfig& config, int64_t tokens);

 private:
  void ListParts(const LayerWeights& weights, int64_t n, FeedForwardTape& tape) const;
  void Route(const LayerWeights& weights, int64_t n, FeedForwardTape& tape);
  float ScaleOf(const LayerWeights& weights, const FeedForwardTape& tape,
                const FeedForwardPart& part, int64_t row) const;
  void PartBackward(const LayerWeights& weights, const FeedForwardTape& tape,
                    const FeedForwardPart& part, const float* d_out, int64_t n,
                    const FeedForwardSlots& slots, bool needs_normed);
  void RouterBackward(const LayerWeights& weights, const TrainBatch& batch,
                      const FeedForwardTape& tape, const BalanceLoss& balance,
                      const GradientSlots& slots, bool needs_normed);
  void SharedGateBackward(const LayerWeights& weights, const FeedForwardTape& tape, int64_t n,
                          const GradientSlots& slots, bool needs_normed);

  const ModelConfig& config_;
  ThreadPool& pool_;
  const ComputePrecision precision_;
  GradientProducts products_;
  PackedRows packed_, packed_rows_, packed_inner_;
  AlignedBuffer<float> logits_, rows_, gathered_, d_out_, d_inner_, d_gate_, d_up_, inner_;
  AlignedBuffer<float> d_normed_, d_routing_, d_shared_gate_, d_logits_;
};

const FeedForwardWeights& WeightsOfPart(const LayerWeights& weights, const FeedForwardPart& part);

}  // namespace winnow
