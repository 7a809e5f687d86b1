// The tokens of a layer as its experts see them: which token goes to which expert, what it counts
// for, and its normed rows, made again from the stream whenever they are needed so that nothing of
// the size of the stream is held beside it.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/thread_pool.h"       // ThreadPool
#include "forward/hidden_states.h"  // HiddenStates
#include "forward/layer_sweep.h"    // LayerSweep, SequenceTile
#include "kernels/matmul.h"         // PackedRows
#include "model/model_config.h"     // ModelConfig
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

// A run of tokens, ascending, and what each counts for.
struct WeightedTokens {
  std::vector<int32_t> tokens;
  std::vector<float> weights;
};

class LayerTokens {
 public:
  // `stream` and `tiles` must outlive it.
  LayerTokens(const ModelConfig& config, HiddenStates& stream,
              const std::vector<SequenceTile>& tiles, ThreadPool& pool);

  // Every token counts 1 / |h|^2, h its row of the stream as it is now: what an error of the same
  // size does to what follows (norms divide by it).
  void WeighByStream();
  // Likewise with h' = h + the output of the layer's feed-forward block, run by `sweep`; then
  // routes: an expert's tokens count (routing weight)^2 / |h'|^2, the share of its squared error
  // that reaches the stream. The first layers write much more than they find there, so |h| would
  // not do. Layers without a router show every token to every expert.
  void Route(int64_t layer, const LayerWeights& weights, LayerSweep& sweep);

  const WeightedTokens& all() const { return all_; }
  const WeightedTokens& expert(int64_t e) const { return experts_[static_cast<size_t>(e)]; }
  // Every so many tokens, at most `count` of all.
  WeightedTokens Spaced(int64_t count) const;

  // Calls visit(rows [n, hidden], weights [n], n) for the normed rows of `tokens`, kMomentRows of
  // them at most at a time, in order.
  void ForNormedRows(const WeightedTokens& tokens, const std::vector<float>& norm,
                     const std::function<void(const float*, const float*, int64_t)>& visit);

  static uint64_t Bytes(const ModelConfig& config, int64_t num_tokens, int64_t largest_tile);

 private:
  void RouteTile(const LayerWeights& weights, const SequenceTile& tile, const float* hidden);

  const ModelConfig& config_;
  HiddenStates& stream_;
  const std::vector<SequenceTile>& tiles_;
  ThreadPool& pool_;
  WeightedTokens all_;
  std::vector<WeightedTokens> experts_;
  std::vector<float> rows_, normed_, logits_, topk_weights_;
  std::vector<int32_t> topk_ids_;
  PackedRows packed_;
};

}  // namespace winnow
