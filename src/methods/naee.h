// NAEE: "Not All Experts are Equal", arXiv 2402.14800, section 3.2 (layer-wise combinational
// pruning) and its published code (method/expert_pruning.py).
//
// For each MoE layer and each set D of E - r experts to drop:
//   L(D) = sum over calibration batches b of || Z_b - Zhat_b(D) ||_F      (not squared)
// with Z the layer's routed output and Zhat the same with the router restricted to the survivors.
// The smallest L wins; ties go to the lexicographically first D.
//
// Exact from statistics: with w the routing weights of all experts, w(S) those of the survivors and
// d = w(S) - w, || z - zhat ||^2 = d^T G d per token, G the Gram matrix of the experts' outputs; in
// progressive runs, with a target z* of the intact model: |z*|^2 - 2 w(S).b + w(S)^T G w(S), b_e =
// f_e . z*. Differences from the published code: weights and sums in double instead of bf16; any
// router with or without renormalisation (deleting rows also raises the survivors' softmax, as the
// saved checkpoint will).
#pragma once

#include <cstdint>

#include "base/progress.h"           // JobControl
#include "base/thread_pool.h"        // ThreadPool
#include "methods/naee_objective.h"  // NaeeObjective
#include "methods/super_experts.h"   // GuardedExperts
#include "observe/layer_stats.h"     // LayerStatsReader
#include "observe/stats_info.h"      // StatsInfo
#include "plan/compression_plan.h"   // LayerPlan

namespace winnow {

// Most subsets a layer is enumerated over.
inline constexpr uint64_t kMaxSubsets = 5000;

enum class SubsetSearch {
  kAuto,       // enumeration where a layer has at most kMaxSubsets subsets, else elimination
  kEnumerate,  // the best of all subsets
  kEliminate,  // backward elimination, then exchanges (naee_search.h)
};
struct NaeeOptions {
  int64_t keep = 0;  // survivors a layer
  SubsetSearch search = SubsetSearch::kAuto;
  NaeeObjective objective = NaeeObjective::kUnsquared;
  uint64_t memory_budget_bytes = 0;
  GuardedExperts guarded = {};  // never dropped
};
// The search that kAuto stands for.
SubsetSearch ResolveSearch(const NaeeOptions& options, const StatsLayer& layer);
// Of the largest layer's choice, for memory plans.
uint64_t NaeeBytes(const StatsInfo& info, const NaeeOptions& options);

// C(n, k), saturating at UINT64_MAX.
uint64_t BinomialCoefficient(int64_t n, int64_t k);

// UsageError if the statistics cannot answer: no Gram records, fewer survivors than k, progressive
// statistics of another keep, enumeration of more than kMaxSubsets.
void CheckNaee(const StatsInfo& info, const NaeeOptions& options);

// The loss of any set of survivors, e.g. one that another method chose.
double NaeeLoss(const LayerStatsReader& records, const StatsInfo& info, const StatsLayer& layer,
                const std::vector<int32_t>& kept, NaeeObjective objective, ThreadPool& pool,
                const JobControl& control);
// What a set of survivors loses of the layer's output, by source: the sum over its tokens of
// ||z - zhat||^2 / ||z||^2, and the weight of the tokens it is over.
struct OutputLoss {
  double sum = 0, weight = 0;
};
std::vector<OutputLoss> LossOfOutput(const LayerStatsReader& records, const StatsInfo& info,
                                     const StatsLayer& layer, const std::vector<int32_t>& kept,
                                     ThreadPool& pool, const JobControl& control);
// UsageError if a layer has more guarded experts than are kept.
void CheckGuarded(const NaeeOptions& options);
// The guarded experts of a layer.
std::vector<int32_t> GuardedIn(const GuardedExperts& guarded, const StatsLayer& layer);

// The survivors of one layer.
LayerPlan ChooseNaee(const LayerStatsReader& records, const StatsInfo& info,
                     const StatsLayer& layer, const NaeeOptions& options, ThreadPool& pool,
                     const JobControl& control);

}  // namespace winnow
