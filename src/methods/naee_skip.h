// Dynamic expert skipping: "Not All Experts are Equal", arXiv 2402.14800, section 3.3 and its
// published code (method/dynamic_skipping.py), which is for k = 2: beta of a layer is the median
// over the calibration tokens of p(2) / p(1), p the router's probabilities; at run time the second
// expert is not run if p(2) < beta p(1).
//
// Ours: any k (ranks i with p(i) < beta p(1) are skipped; the median is of p(k) / p(1), so half of
// the tokens lose at least one expert), and thresholds from exact errors instead of a fixed half.
// Skipping the last ranks of a token changes the layer's output by || z - z' ||^2 = d^T G d
// (naee.h), taken relative to the residual stream. In each layer the tokens' ranks are sorted by
// p(i) / p(1); the mean error a skip in each of 400 bins, made monotone (isotonic regression), is
// the price of raising beta further there. One price for all layers spends a budget of skips at the
// least error.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "base/file.h"              // fs
#include "base/progress.h"          // JobControl
#include "base/thread_pool.h"       // ThreadPool
#include "observe/layer_stats.h"    // LayerStatsReader
#include "observe/stats_info.h"     // StatsInfo
#include "plan/compression_plan.h"  // LayerPlan

namespace winnow {

struct SkipBudget {
  // One of them: mean experts a token over all layers, the sum over layers of the mean of ||z -
  // z'||^2 / ||h'||^2, or the share of the ranks after the first that every layer skips alike,
  // which is the published rule with another quantile and any k: what the other two are compared
  // with.
  std::optional<double> active_experts = {};
  std::optional<double> max_error = {};
  std::optional<double> quantile = {};
};

// UsageError if nothing can be skipped or the budget is out of range; a budget needs level full.
void CheckNaeeSkip(const StatsInfo& info, const std::optional<SkipBudget>& budget);
// What a choice holds, for memory plans.
uint64_t NaeeSkipBytes(const StatsInfo& info);

// Every layer with all its experts and a beta; `loss` is the mean relative error where it is known.
std::vector<LayerPlan> ChooseNaeeSkip(const fs::path& stats, const StatsInfo& info,
                                      const std::optional<SkipBudget>& budget, ThreadPool& pool,
                                      const JobControl& control);

}  // namespace winnow
