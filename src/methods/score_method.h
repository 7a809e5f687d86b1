// Pruning by a score of each expert: the highest `keep` of a layer survive. One file a criterion in
// scores/; all from the same statistics, so that they can be compared side by side.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/progress.h"           // JobControl
#include "base/thread_pool.h"        // ThreadPool
#include "methods/expert_summary.h"  // ExpertSummary
#include "observe/layer_stats.h"     // LayerStatsReader
#include "observe/stats_info.h"      // StatsInfo, StatsLayer, StatsLevel
#include "plan/compression_plan.h"   // LayerPlan

namespace winnow {

// One layer as criteria see it.
struct ScoreInput {
  const LayerStatsReader& records;
  const StatsInfo& info;
  const StatsLayer& layer;
  const ExpertSummary& summary;
  uint64_t memory_budget_bytes = 0;
  ThreadPool& pool;
  const JobControl& control;
};

struct ScoreMethod {
  const char* name;                                       // as --method takes it
  const char* formula;                                    // for people
  StatsLevel needs;                                       // the least level of statistics
  std::vector<double> (*score)(const ScoreInput& input);  // [E], higher is kept
};

extern const ScoreMethod kFrequency, kSeer, kEan, kWeightedEan, kReap, kMan, kMsan, kEasyEp, kAimer,
    kLeaveOneOut;

// Every criterion, in the order of their papers.
std::span<const ScoreMethod* const> ScoreMethods();
// Null if there is none of that name.
const ScoreMethod* FindScoreMethod(const std::string& name);

// UsageError if the statistics have less than the criterion needs, or too few experts would stay.
void CheckScoreMethod(const ScoreMethod& method, const StatsInfo& info, int64_t keep);

// The `keep` experts of highest score, ascending; ties go to the lower number. `guarded` experts
// come before all others.
std::vector<int32_t> HighestScores(std::vector<double> scores, int64_t keep,
                                   const std::vector<int32_t>& guarded = {});

// sum / count, 0 for experts that no token used.
std::vector<double> MeanOverTokens(const std::vector<double>& sums,
                                   const std::vector<double>& tokens);

}  // namespace winnow
