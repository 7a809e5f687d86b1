#include "methods/score_method.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace winnow {

std::span<const ScoreMethod* const> ScoreMethods() {
  static constexpr const ScoreMethod* kAll[] = {&kFrequency, &kSeer,       &kEan,  &kWeightedEan,
                                                &kReap,      &kMan,        &kMsan, &kEasyEp,
                                                &kAimer,     &kLeaveOneOut};
  return kAll;
}

const ScoreMethod* FindScoreMethod(const std::string& name) {
  for (const ScoreMethod* method : ScoreMethods()) {
    if (name == method->name) return method;
  }
  return nullptr;
}

void CheckScoreMethod(const ScoreMethod& method, const StatsInfo& info, int64_t keep) {
  if (static_cast<int>(info.level) < static_cast<int>(method.needs)) {
    throw UsageError(
        fmt::format("--method {} needs statistics of level {}; these have level {}", method.name,
                    StatsLevelName(method.needs), StatsLevelName(info.level)),
        fmt::format("observe again with --stats {}", StatsLevelName(method.needs)));
  }
  if (keep < info.num_experts_per_tok) {
    throw UsageError(
        fmt::format("--keep {}: each token uses {} experts", keep, info.num_experts_per_tok),
        "keep at least num_experts_per_tok experts");
  }
  for (const StatsLayer& layer : info.layers) {
    if (keep < layer.num_experts) continue;
    throw UsageError(fmt::format("--keep {}: layer {} has {} experts, so none would go", keep,
                                 layer.layer, layer.num_experts));
  }
}

std::vector<int32_t> HighestScores(std::vector<double> scores, int64_t keep,
                                   const std::vector<int32_t>& guarded) {
  for (const int32_t e : guarded) {
    scores[static_cast<size_t>(e)] = std::numeric_limits<double>::infinity();
  }
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(keep));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<double> MeanOverTokens(const std::vector<double>& sums,
                                   const std::vector<double>& tokens) {
  std::vector<double> mean(sums.size());
  for (size_t e = 0; e < sums.size(); ++e) {
    if (tokens[e] > 0) mean[e] = sums[e] / tokens[e];
  }
  return mean;
}

}  // namespace winnow
