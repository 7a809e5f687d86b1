// The feed-forward block of a decoder layer: norm, then a dense SwiGLU or router + experts (+
// shared expert), added to the residual stream. Experts run on their gathered tokens, or on every
// token when an observer asks for un-routed outputs; both give the same stream bit for bit, because
// a product's row does not depend on the other rows and a token's experts are summed in ascending
// order either way.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"      // AlignedBuffer
#include "base/thread_pool.h"         // ThreadPool
#include "forward/expert_skipping.h"  // SkipBetas, SkipCounts
#include "forward/moe_observer.h"     // MoeObserver
#include "kernels/matmul.h"           // PackedRows
#include "model/model_config.h"       // ModelConfig
#include "weights/layer_weights.h"    // LayerWeights

namespace winnow {

struct FeedForwardCall {
  int64_t layer = 0;        // decoder index, for observers
  int64_t first_token = 0;  // position of hidden[0] in the token set, for observers
  MoeObserver* observer = nullptr;
  bool add_to_residual = true;  // false: only observe (the stream is advanced by a later call)
};

class FeedForwardBlock {
 public:
  FeedForwardBlock(const ModelConfig& config, ThreadPool& pool,
                   ComputePrecision precision = ComputePrecision::kF32);

  // From now on experts are skipped by these thresholds, and counted.
  void SetSkipping(const SkipBetas& betas);
  const SkipCounts& skip_counts() const { return skip_counts_; }
  // Experts of the last Run's tokens (its last 4,096 if it had more): [tokens, k], best first, ~id
  // where one was skipped. Of a layer with a router.
  const int32_t* last_ids() const { return ids_.data(); }

  // hidden [n, hidden_size] in place. The layer is a MoE layer iff weights.router is set.
  void Run(const LayerWeights& weights, const FeedForwardCall& call, int64_t n, float* hidden);

  // y [n, hidden_size] = the SwiGLU alone of normed rows x [n, hidden_size].
  void RunExpert(const FeedForwardWeights& expert, const float* x, int64_t n, float* y);

  // inner [n, width] (stride ld) = silu(gate) * up of normed rows x: what the down projection sees.
  void RunInner(const FeedForwardWeights& expert, const float* x, int64_t n, float* inner,
                int64_t ld);

  // Tokens computed at once: all experts' outputs of a chunk stay within ~64 MiB.
  static int64_t ChunkTokens(const ModelConfig& config, const LayerConfig& layer, bool all_experts);
  // Scratch of the largest layer, for memory plans.
  static uint64_t ScratchBytes(const ModelConfig& config, bool all_experts);

 private:
  void RunChunk(const LayerWeights& weights, const FeedForwardCall& call, int64_t n, float* hidden);
  // y [rows, hidden] (stride ld) = SwiGLU of the rows in `x`.
  void SwiGluMlp(const FeedForwardWeights& weights, const PackedRows& x, float* y, int64_t ld);
  // keep_outputs: also store each selected expert's output in selected_. Observers that want rows
  // get them.
  void RouteGathered(const LayerWeights& weights, const FeedForwardCall& call, int64_t n,
                     bool keep_outputs);
  void RouteAllExperts(const LayerWeights& weights, int64_t n);
  void AddShared(const LayerWeights& weights, const FeedForwardCall& call, int64_t n);
  // Layers without a router: what they have is added up in output_.
  void RunUnrouted(const LayerWeights& weights, const FeedForwardCall& call, int64_t n);
  void AddUnrouted(const FeedForwardWeights& part, int32_t expert, float alpha,
                   const FeedForwardCall& call, int64_t n);
  // The rows that the last SwiGluMlp computed, to an observer that wants them.
  template <class TokenOf, class WeightOf>
  void ShowRows(const FeedForwardCall& call, int32_t expert, int64_t rows, int64_t width,
                const TokenOf& token_of, const WeightOf& weight_of);

  const ModelConfig& config_;
  ThreadPool& pool_;
  const ComputePrecision precision_;
  SkipBetas betas_;
  SkipCounts skip_counts_;
  PackedRows packed_input_, packed_rows_, packed_inner_;
  AlignedBuffer<float> normed_, logits_, weights_, dropped_weight_, routed_, output_, shared_gate_;
  AlignedBuffer<float> gate_, up_, rows_, expert_outputs_, selected_;
  AlignedBuffer<int32_t> ids_;
  std::vector<std::vector<int32_t>> tokens_of_expert_;
  std::vector<std::vector<int64_t>> slots_of_expert_;  // token * k + rank
};

}  // namespace winnow
