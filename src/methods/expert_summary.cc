#include "methods/expert_summary.h"

#include <span>

#include "methods/router_ranking.h"

namespace winnow {

ExpertSummary SummarizeExperts(const LayerStatsReader& records, const StatsInfo& info,
                               const StatsLayer& layer) {
  const auto experts = static_cast<size_t>(layer.num_experts);
  const auto k = static_cast<size_t>(info.num_experts_per_tok);
  ExpertSummary sums;
  sums.tokens.resize(experts);
  sums.weight.resize(experts);
  RoutingRecords batch;
  std::vector<int32_t> order(experts);
  std::vector<double> mass(experts);
  int64_t first = 0;
  for (const int64_t num_tokens : info.BatchTokens()) {
    records.ReadRouting(first, num_tokens, batch);
    first += num_tokens;
    const bool has_norms = !batch.selected_norm.empty();
    if (has_norms && sums.norm.empty()) {
      sums.norm.resize(experts);
      sums.weighted_norm.resize(experts);
      sums.norm_squared.resize(experts);
    }
    for (size_t t = 0; t < static_cast<size_t>(num_tokens); ++t) {
      const std::span logits = std::span(batch.router_logits).subspan(t * experts, experts);
      RankExperts(logits, info.num_experts_per_tok, std::span(order));
      SoftmaxOfLogits(logits, order[0], mass);
      double used = 0;
      for (size_t i = 0; i < k; ++i) used += mass[static_cast<size_t>(order[i])];
      const double scale = info.norm_topk_prob ? 1 / (used + info.normalize_epsilon) : 1.0;
      for (size_t i = 0; i < k; ++i) {
        const auto e = static_cast<size_t>(order[i]);
        const double w = mass[e] * scale;
        ++sums.tokens[e];
        sums.weight[e] += w;
        if (!has_norms) continue;
        const auto norm = static_cast<double>(batch.selected_norm[t * k + i]);
        sums.norm[e] += norm;
        sums.weighted_norm[e] += w * norm;
        sums.norm_squared[e] += norm * norm;
      }
    }
  }
  return sums;
}

}  // namespace winnow
