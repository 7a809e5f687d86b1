// Planning as functions, shared by plan and compress: from statistics to a plan, to a comparison of
// methods, or to the losses of every ratio.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "methods/naee.h"           // NaeeOptions
#include "methods/naee_skip.h"      // SkipBudget
#include "methods/score_method.h"   // ScoreInput
#include "model/model.h"            // Model
#include "plan/compression_plan.h"  // CompressionPlan
#include "session.h"                // Session
#include "text/block_builder.h"     // SourceBlocks

namespace winnow::cli {

// The statistics as plans are to count them: sources times `mix` ("prose=1,code=3", by name; 1
// where it says nothing), and the mask of the data, if it has one, unless `all_tokens`.
StatsInfo ReadWeighedStats(Session& session, const fs::path& stats, const std::string& mix,
                           bool all_tokens);
// Experts with rare but huge activations (super_experts.h), after naming them.
std::vector<SuperExpert> NameSuperExperts(Session& session, const fs::path& stats,
                                          const StatsInfo& info);

// How survivors are chosen: by NAEE or by a score (score_method.h).
struct PruningChoice {
  std::string method = "naee";
  NaeeOptions naee = {};  // keep counts for every method; the budget is set by MakePruningPlan
  // keep x layers survivors in all, more where they matter more; at least `floor` a layer (0: k).
  bool uneven = false;
  int64_t floor = 0;
  // Kept by scores and by objectives relative to a token, which hardly see them. NAEE's own loss
  // and its square count their outputs in full, so its choice stands as published.
  std::vector<SuperExpert> super_experts = {};
};
// The survivors of every layer.
CompressionPlan MakePruningPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                PruningChoice choice, const std::string& target);
// The better of two plans on the calibration sequences that healing keeps for judging.
CompressionPlan BetterPlan(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, const CompressionPlan& uneven,
                           const CompressionPlan& uniform, const std::string& spill_folder);
// By the weights alone (AIMER), without statistics.
CompressionPlan MakeWeightsPlan(Session& session, const Model& model, int64_t keep,
                                const std::string& target);
// NAEE's loss for every number of survivors, from all but one down to k, to stdout.
void PrintCurve(Session& session, const fs::path& stats, const StatsInfo& info,
                PruningChoice choice);
// What every method would drop, beside each other, to stdout.
void ComparePruning(Session& session, const fs::path& stats, const StatsInfo& info,
                    const PruningChoice& choice);
// A short table of a plan, for people.
std::string DescribePlan(const CompressionPlan& plan);

// Thresholds of run-time skipping; published, or by a budget.
CompressionPlan MakeSkippingPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                 const std::optional<SkipBudget>& budget,
                                 const std::string& target);

// Steps that plans and tables share.

// Names of the texts, in the order in which they first appear: rounds of one text have one name.
std::vector<std::string> SourceNames(const StatsInfo& info);
std::vector<std::string> Unique(const std::vector<std::string>& names);
// Which of the named experts are guarded; see PruningChoice. What progressive statistics chose is
// not changed any more.
GuardedExperts GuardFor(const StatsInfo& info, const PruningChoice& choice);
// Budget for records held while planning; refuses what does not fit.
uint64_t RequirePlanMemory(Session& session, const StatsInfo& info, const NaeeOptions& options);
LayerPlan ChooseByScore(const std::vector<double>& scores, const ScoreInput& input,
                        const NaeeOptions& options);
// `layer` counts the statistics' layers: how far planning is.
void ReportPlanned(const Session& session, const StatsInfo& info, size_t layer);

}  // namespace winnow::cli
