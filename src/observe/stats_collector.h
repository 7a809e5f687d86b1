// Turns what a MoE layer does with its tokens into records and sums (layer_stats.h). One collector
// per layer; listens to forward/ as a MoeObserver. Sums over tokens are taken in double, in token
// order, so they are the same for any number of threads and any tiling.
#pragma once

#include <cstdint>
#include <vector>

#include "base/thread_pool.h"       // ThreadPool
#include "forward/moe_observer.h"   // MoeObserver
#include "observe/layer_stats.h"    // LayerStatsWriter
#include "observe/stats_info.h"     // StatsInfo
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

// mean |w| / rms w of each expert's weights, gate, up and down together [E].
std::vector<double> WeightFlatness(const LayerWeights& weights, ThreadPool& pool);

class StatsCollector : public MoeObserver {
 public:
  StatsCollector(const StatsInfo& info, const StatsLayer& layer, LayerStatsWriter& writer,
                 ThreadPool& pool);
  ~StatsCollector() override;

  bool WantsExpertOutputs() const override { return info_.level == StatsLevel::kFull; }
  bool WantsSelectedOutputs() const override { return info_.level == StatsLevel::kRouted; }
  void OnTokens(const MoeTokens& tokens) override;

  // Progressive runs: [n, hidden] of tokens from `first_token` on, the intact model's routed output
  // z*, or its stream behind the layer if the target repairs drift. Valid until the next call; must
  // cover what OnTokens sees.
  void SetTarget(const float* target, int64_t first_token);
  // Writes the sums and finishes the file.
  void Finish();

  static uint64_t Bytes(const StatsInfo& info, int64_t max_experts, int64_t chunk_tokens);

 private:
  struct SourceSums;
  void Records(const MoeTokens& m);
  void Sums(const MoeTokens& m);

  const StatsInfo& info_;
  LayerStatsWriter& writer_;
  ThreadPool& pool_;
  int64_t num_experts_;
  const float* target_ = nullptr;
  int64_t target_first_ = 0;
  std::vector<int64_t> source_end_;  // token index behind each source
  std::vector<float> gram_, norms_, residual_, stream_, dots_, routed_, target_dot_, target_norm_;
  std::vector<SourceSums> sums_;
};

}  // namespace winnow
