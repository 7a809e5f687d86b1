// One decoder layer for one new token of each of several sequences: what decoding runs, where the
// time is the time to read weights. The experts of all tokens are one set of products, each read
// once. A row's result depends on its own sequence alone, bit for bit, whatever else is in the
// call; its last bits differ from what AttentionBlock and FeedForwardBlock give, whose sums are in
// another order.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"      // AlignedBuffer
#include "base/thread_pool.h"         // ThreadPool
#include "forward/expert_skipping.h"  // SkipBetas, SkipCounts
#include "forward/kv_cache.h"         // LayerCache
#include "forward/rope_table.h"       // RopeTable
#include "kernels/matvec.h"           // VectorRows
#include "model/model_config.h"       // ModelConfig
#include "weights/layer_weights.h"    // LayerWeights

namespace winnow {

// A row of the call: the token's position, and the layer's cache of its sequence (of `capacity`
// rows a head), which holds all tokens before it and gets this one.
struct TokenRow {
  int64_t position = 0;
  int64_t capacity = 0;
  LayerCache* cache = nullptr;
};

class TokenStep {
 public:
  TokenStep(const ModelConfig& config, ThreadPool& pool);

  // hidden [rows, hidden_size] in place.
  void RunAttention(const LayerWeights& weights, std::span<const TokenRow> rows, float* hidden);
  // Experts below `beta` times the best are skipped; 0: none.
  void RunFeedForward(const LayerWeights& weights, int64_t rows, double beta, float* hidden);

  // Of the last RunFeedForward through a router: ids [rows, k], best first, ~id where
  // skipped; and the share of the k probabilities that was skipped, [rows].
  std::span<const int32_t> ids() const { return ids_; }
  std::span<const float> dropped_weight() const { return dropped_weight_; }

  // Scratch for `rows` rows with caches of `capacity`, for memory plans.
  static uint64_t ScratchBytes(const ModelConfig& config, int64_t rows, int64_t capacity,
                               int num_threads);

 private:
  // A SwiGLU of the layer and the rows that go through it.
  struct Part {
    const FeedForwardWeights* weights = nullptr;
    std::vector<int32_t> rows;    // empty: all rows of the call, in order
    std::vector<float> scales;    // of each row's output
    AlignedBuffer<float> input;   // [rows, hidden], gathered
    AlignedBuffer<float> inner;   // gate, up and their product, [3, rows, width]
    AlignedBuffer<float> output;  // [rows, hidden]
    VectorRows x, inner_x;
  };
  Part& AddPart(const FeedForwardWeights& weights);
  void Route(const LayerWeights& weights, int64_t rows, double beta);
  void RunParts(int64_t rows);

  const ModelConfig& config_;
  ThreadPool& pool_;
  RopeTable rope_;
  AlignedBuffer<float> normed_, q_, k_, v_, attended_, projected_, logits_, sum_, shared_gate_;
  std::vector<AlignedBuffer<float>> scores_;  // of each worker
  VectorRows x_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_, dropped_weight_;
  std::vector<Part> parts_;  // buffers are reused from layer to layer
  size_t num_parts_ = 0;
};

}  // namespace winnow
