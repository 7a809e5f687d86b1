// The steps of the workflow as functions, shared by their verbs and by compress.
#pragma once

#include <string>
#include <vector>

#include "apply/checkpoint_rewriter.h"  // RewritePlan, ApplyOptions
#include "methods/naee.h"               // NaeeOptions
#include "observe/observe_run.h"        // ObserveOptions, ObservePlan
#include "plan/compression_plan.h"      // CompressionPlan
#include "session.h"                    // Session

namespace winnow::cli {

// Prints what observing will hold, compute and write; refuses what does not fit.
ObservePlan PrepareObserve(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, ObserveOptions& options,
                           const std::string& output);
// Coverage of every MoE layer as JSON; warns with the names of experts no token reached.
OrderedJson ReportCoverage(Session& session, const fs::path& stats, const StatsInfo& info);

// The survivors chosen by NAEE for every layer. Sets options.memory_budget_bytes.
CompressionPlan MakeNaeePlan(Session& session, const fs::path& stats, const StatsInfo& info,
                             NaeeOptions options, const std::string& target);
// A short table of a plan, for people.
std::string DescribePlan(const CompressionPlan& plan);

// What --plan means to a verb that runs a model: the survivors of each layer (empty without a
// plan).
std::vector<std::vector<int32_t>> WhatIf(Session& session, const Model& model,
                                         const std::string& plan_path);

}  // namespace winnow::cli
