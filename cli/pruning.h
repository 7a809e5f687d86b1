// Observing, skipping and what-if plans as functions, shared by the verbs that do them.
#pragma once

#include <string>
#include <vector>

#include "apply/checkpoint_rewriter.h"  // RewritePlan, ApplyOptions
#include "forward/expert_skipping.h"    // SkipBetas, SkipCounts
#include "observe/observe_run.h"        // ObserveOptions, ObservePlan
#include "plan/compression_plan.h"      // CompressionPlan
#include "session.h"                    // Session

namespace winnow::cli {

// Prints what observing will hold, compute and write; refuses what does not fit.
ObservePlan PrepareObserve(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, ObserveOptions& options,
                           const std::string& output);
// Whether `stats` is there already and --resume goes on from it; UsageError if it is of another run
// than the one that `expected` describes.
bool HasFinishedStats(const Session& session, const fs::path& stats, const StatsInfo& expected);
// What --dry-run --json tells of it.
OrderedJson DescribeObserve(const ObservePlan& plan);
// Coverage of every MoE layer as JSON; warns with the names of experts no token reached.
OrderedJson ReportCoverage(Session& session, const fs::path& stats, const StatsInfo& info);

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
