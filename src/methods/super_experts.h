// Experts with rare but huge activations ("super experts", arXiv 2507.23279): a handful in a model,
// whose outputs carry the massive activations that attention leans on. A mean over tokens hardly
// sees them, and without them a model can break down. They are named; methods that hardly see them
// are kept from removing them.
//
// An expert is one if the largest output of one of its channels is above the 99.5th percentile of
// all experts of all layers and above a tenth of the largest (as in REAP's program), and, so that
// models without such experts have none, at least ten times the median of its layer.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "base/file.h"           // fs
#include "observe/stats_info.h"  // StatsInfo

namespace winnow {

// Guarded experts of each decoder layer that has some, ascending, numbered as the statistics are.
using GuardedExperts = std::map<int32_t, std::vector<int32_t>>;

struct SuperExpert {
  int32_t layer = 0;   // decoder index
  int32_t expert = 0;  // as the statistics number it
  double largest = 0;  // |f| of one channel
  double times_median = 0;
};

// `largest` [layers][E] of the layers `info` lists. For tests and for FindSuperExperts.
std::vector<SuperExpert> SuperExpertsOf(const StatsInfo& info,
                                        const std::vector<std::vector<double>>& largest);
// From a statistics folder; none at level routing, which has no outputs.
std::vector<SuperExpert> FindSuperExperts(const fs::path& stats, const StatsInfo& info);
GuardedExperts Guarded(const std::vector<SuperExpert>& experts);

}  // namespace winnow
