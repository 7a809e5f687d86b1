// The steps of the workflow as functions, shared by their verbs and by compress.
#pragma once

#include <string>
#include <vector>

#include "apply/checkpoint_rewriter.h"  // RewritePlan, ApplyOptions
#include "forward/expert_skipping.h"    // SkipBetas, SkipCounts
#include "methods/naee.h"               // NaeeOptions
#include "methods/naee_skip.h"          // SkipBudget
#include "observe/observe_run.h"        // ObserveOptions, ObservePlan
#include "plan/compression_plan.h"      // CompressionPlan
#include "session.h"                    // Session

namespace winnow::cli {

// Prints what observing will hold, compute and write; refuses what does not fit.
ObservePlan PrepareObserve(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, ObserveOptions& options,
                           const std::string& output);
// What --dry-run --json tells of it.
OrderedJson DescribeObserve(const ObservePlan& plan);
// Coverage of every MoE layer as JSON; warns with the names of experts no token reached.
OrderedJson ReportCoverage(Session& session, const fs::path& stats, const StatsInfo& info);

// How survivors are chosen: by NAEE or by a score (score_method.h).
struct PruningChoice {
  std::string method = "naee";
  NaeeOptions naee = {};  // keep counts for every method; the budget is set by MakePruningPlan
  // keep x layers survivors in all, more where they matter more; at least `floor` a layer (0: k).
  bool uneven = false;
  int64_t floor = 0;
};
// The survivors of every layer.
CompressionPlan MakePruningPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                PruningChoice choice, const std::string& target);
// The better of two plans on the calibration sequences that healing keeps for judging.
CompressionPlan BetterPlan(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, const CompressionPlan& uneven,
                           const CompressionPlan& uniform, const std::string& spill_folder);
// What every method would drop, beside each other, to stdout.
void ComparePruning(Session& session, const fs::path& stats, const StatsInfo& info,
                    const NaeeOptions& options);
// A short table of a plan, for people.
std::string DescribePlan(const CompressionPlan& plan);

// Thresholds of run-time skipping; published, or by a budget.
CompressionPlan MakeSkippingPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                 const std::optional<SkipBudget>& budget,
                                 const std::string& target);
// Which experts are skipped at run time: by the plan if it is given, else as config.json says.
// `no_skip`: none.
SkipBetas SkippingOf(const Model& model, const std::string& plan_path, bool no_skip);
// "1.51 of 2 experts a token, ..." of what was skipped; empty if nothing could be.
std::string DescribeSkipping(const Model& model, const SkipCounts& counts);
OrderedJson SkippingJson(const Model& model, const SkipCounts& counts);

// What --plan means to a verb that runs a model: the survivors of each layer (empty without a
// plan).
std::vector<std::vector<int32_t>> WhatIf(Session& session, const Model& model,
                                         const std::string& plan_path);

}  // namespace winnow::cli
