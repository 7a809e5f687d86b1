// NAEE's objective (naee.h) over more subsets than can be enumerated: backward elimination, then
// swaps.
//
// Elimination drops the expert whose removal gives the least loss, again and again; its sets are
// nested, so one run answers every ratio. Then the best of all exchanges of a survivor for a
// dropped expert is made until none lowers the loss. Both need the statistics alone: removing or
// adding an expert changes a token's error through the few experts it uses, and every term is in
// the Gram matrix. Called by naee.cc.
#pragma once

#include <cstdint>
#include <vector>

#include "base/progress.h"           // JobControl
#include "base/thread_pool.h"        // ThreadPool
#include "methods/naee_objective.h"  // NaeeObjective
#include "observe/layer_stats.h"     // LayerStatsReader
#include "observe/stats_info.h"      // StatsInfo

namespace winnow {

struct NaeeSearchOptions {
  NaeeObjective objective = NaeeObjective::kUnsquared;
  // Records stay in memory if they fit into this, else they are read again for every step.
  uint64_t memory_bytes = 0;
  std::vector<int32_t> guarded = {};  // experts that are never dropped
};

struct NaeeSet {
  std::vector<int32_t> kept;  // ascending
  double loss = 0;
  // Least loss among the sets one exchange away.
  double next_loss = 0;
  double whole = 0;   // the loss if the layer put out nothing
  double weight = 0;  // what all tokens count for
};

// Sets for every number of survivors from all experts but one down to `least`, in that order: each
// is the one before without the expert that costs least, bettered by exchanges where a layer has at
// most kMostPolished experts. Shorter where guarded experts are more than `least`.
inline constexpr int64_t kMostPolished = 32;
std::vector<NaeeSet> NaeeCurve(const LayerStatsReader& records, const StatsInfo& info,
                               const StatsLayer& layer, const NaeeSearchOptions& options,
                               int64_t least, ThreadPool& pool, const JobControl& control);

// The best `keep` survivors that elimination and swaps find.
NaeeSet SearchNaee(const LayerStatsReader& records, const StatsInfo& info, const StatsLayer& layer,
                   const NaeeSearchOptions& options, int64_t keep, ThreadPool& pool,
                   const JobControl& control);

// The published loss with each expert alone removed [E].
std::vector<double> RemovalLosses(const LayerStatsReader& records, const StatsInfo& info,
                                  const StatsLayer& layer, uint64_t memory_bytes, ThreadPool& pool,
                                  const JobControl& control);

// What SearchNaee holds besides the records, for memory plans.
uint64_t NaeeSearchBytes(const StatsInfo& info, const StatsLayer& layer);

}  // namespace winnow
