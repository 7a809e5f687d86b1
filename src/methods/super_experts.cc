#include "methods/super_experts.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "observe/layer_stats.h"

namespace winnow {
namespace {

constexpr double kPercentile = 0.995;
constexpr double kShareOfLargest = 0.1;
constexpr double kTimesMedian = 10;

// Between neighbours in proportion, as NumPy's quantile does by default.
double Quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const double place = share * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(place);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (place - std::floor(place)) * (values[high] - values[low]);
}

}  // namespace

std::vector<SuperExpert> SuperExpertsOf(const StatsInfo& info,
                                        const std::vector<std::vector<double>>& largest) {
  std::vector<double> all;
  for (const std::vector<double>& layer : largest)
    all.insert(all.end(), layer.begin(), layer.end());
  std::vector<SuperExpert> found;
  if (all.empty()) return found;
  const double percentile = Quantile(all, kPercentile);
  const double least = kShareOfLargest * *std::max_element(all.begin(), all.end());
  for (size_t i = 0; i < largest.size(); ++i) {
    if (largest[i].empty()) continue;
    const double median = Quantile(largest[i], 0.5);
    for (size_t e = 0; e < largest[i].size(); ++e) {
      const double value = largest[i][e];
      if (!(value > percentile) || !(value > least) || !(value >= kTimesMedian * median)) continue;
      found.push_back({info.layers[i].layer, static_cast<int32_t>(e), value,
                       median > 0 ? value / median : std::numeric_limits<double>::infinity()});
    }
  }
  return found;
}

std::vector<SuperExpert> FindSuperExperts(const fs::path& stats, const StatsInfo& info) {
  if (info.level == StatsLevel::kRouting) return {};
  std::vector<std::vector<double>> largest;
  for (const StatsLayer& layer : info.layers) {
    largest.push_back(LayerStatsReader(stats, info, layer).LargestOutput());
  }
  return SuperExpertsOf(info, largest);
}

GuardedExperts Guarded(const std::vector<SuperExpert>& experts) {
  GuardedExperts guarded;
  for (const SuperExpert& super : experts) guarded[super.layer].push_back(super.expert);
  return guarded;
}

}  // namespace winnow
