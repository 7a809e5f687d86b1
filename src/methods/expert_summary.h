// What each expert of a layer did for the tokens that were routed to it: the sums that scores of
// single experts are made of. Computed from a layer's records; weights are the family's own routing
// weights (softmax over all experts, renormalised over the k in use where the family does).
#pragma once

#include <cstdint>
#include <vector>

#include "observe/layer_stats.h"  // LayerStatsReader
#include "observe/stats_info.h"   // StatsInfo, StatsLayer

namespace winnow {

// All [E]; sums over the tokens A_e that use expert e, with w its routing weight and f its output.
// A token counts for its weight in the data's mask times its source's mix, 1 without either.
struct ExpertSummary {
  std::vector<double> tokens;  // |A_e|
  std::vector<double> weight;  // sum w
  // Empty for statistics of level routing:
  std::vector<double> norm;           // sum |f|
  std::vector<double> weighted_norm;  // sum w |f|
  std::vector<double> norm_squared;   // sum |f|^2
  // By source: sum w |f| max(0, 1 - cos(h, h + z)), z the routed output, without the mix.
  std::vector<std::vector<double>> turning_norm;
};

ExpertSummary SummarizeExperts(const LayerStatsReader& records, const StatsInfo& info,
                               const StatsLayer& layer);

}  // namespace winnow
