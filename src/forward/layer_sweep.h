// Layer-major execution: all tokens through layer i, then layer i + 1. Every weight is read once,
// memory holds one layer (two with prefetch) and one tile of work, whatever the number of tokens.
// Used by observe/, eval/ and traces; the caller owns the loop over layers so that it can
// checkpoint, replace weights or run two streams (progressive pruning).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/memory.h"            // MemoryPlan
#include "base/progress.h"          // JobControl
#include "base/thread_pool.h"       // ThreadPool
#include "forward/attention.h"      // AttentionBlock
#include "forward/feed_forward.h"   // FeedForwardBlock
#include "forward/hidden_states.h"  // HiddenStates
#include "forward/token_set.h"      // TokenSet, SequenceTile
#include "model/model.h"            // Model

namespace winnow {

// Tokens a tile holds by default: enough rows for every product, small enough for the cache of big
// models.
inline constexpr int64_t kTileTokens = 4096;

// Tokens of the largest tile a sweep over `tokens` loads at once.
int64_t LargestTile(const TokenSet& tokens);

// The stream of all tokens: in memory, or in `spill` if it is not empty, a file that has no name
// any more when this returns and vanishes with the process.
std::unique_ptr<HiddenStates> MakeStream(const TokenSet& tokens, int64_t hidden,
                                         const fs::path& spill);

class LayerSweep {
 public:
  LayerSweep(const Model& model, const TokenSet& tokens, ThreadPool& pool,
             const JobControl& control, std::string stage,
             ComputePrecision precision = ComputePrecision::kF32);

  const std::vector<SequenceTile>& tiles() const { return tiles_; }
  // Embedding rows of all tokens into the stream.
  void Embed(HiddenStates& states);
  // One whole layer over all tokens, in place.
  void RunLayer(int64_t layer, const LayerWeights& weights, HiddenStates& states,
                MoeObserver* observer);
  // The two halves, for callers that need them apart (tile by tile).
  void RunAttention(const LayerWeights& weights, const SequenceTile& tile, float* hidden);
  // What the output projection multiplied in the last of them [tokens, query_width].
  const float* attended() const { return attention_.attended(); }
  void RunFeedForward(const LayerWeights& weights, const FeedForwardCall& call, int64_t num_tokens,
                      float* hidden);
  // One expert alone on normed rows x [n, hidden] -> y [n, hidden].
  void RunExpert(const FeedForwardWeights& expert, const float* x, int64_t n, float* y) {
    control_.Poll();
    feed_forward_.RunExpert(expert, x, n, y);
  }
  // What its down projection multiplies, rows of `ld`.
  void RunInner(const FeedForwardWeights& expert, const float* x, int64_t n, float* inner,
                int64_t ld) {
    control_.Poll();
    feed_forward_.RunInner(expert, x, n, inner, ld);
  }
  // Experts are skipped by these thresholds from now on.
  void SetSkipping(const SkipBetas& betas) { feed_forward_.SetSkipping(betas); }
  const SkipCounts& skip_counts() const { return feed_forward_.skip_counts(); }
  // Progress counts tokens x layers; a caller that runs two streams a layer sets the total itself.
  void SetWork(int64_t done, int64_t total) {
    work_done_ = done;
    work_total_ = total;
  }
  void Advance(int64_t layer, int64_t tokens);

  // What a sweep over `tokens` holds besides weights and the stream itself.
  static uint64_t ScratchBytes(const Model& model, const TokenSet& tokens, bool all_experts,
                               int num_threads);

 private:
  const Model& model_;
  const TokenSet& tokens_;
  const JobControl& control_;
  std::string stage_;
  std::vector<SequenceTile> tiles_;
  AttentionBlock attention_;
  FeedForwardBlock feed_forward_;
  int64_t work_done_ = 0;
  int64_t work_total_ = 0;
};

}  // namespace winnow
