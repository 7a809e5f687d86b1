#include "methods/expert_summary.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "methods/router_ranking.h"

namespace winnow {
namespace {

// max(0, 1 - cos(h, h + z)): how far the routed experts turn the residual stream.
double Turning(const RoutingRecords& records, size_t t) {
  const auto before = static_cast<double>(records.residual_norm_squared[t]);
  const auto along = static_cast<double>(records.residual_dot_routed[t]);
  const double after = before + 2 * along + static_cast<double>(records.routed_norm_squared[t]);
  if (!(before > 0) || !(after > 0)) return 0;
  return std::max(0.0, 1 - (before + along) / std::sqrt(before * after));
}

}  // namespace

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
  for (const auto& [first, num_tokens, source, mix] : info.Batches()) {
    records.ReadRouting(first, num_tokens, batch);
    const bool has_norms = !batch.selected_norm.empty();
    if (has_norms && sums.norm.empty()) {
      sums.turning_norm.resize(info.sources.size(), std::vector<double>(experts));
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
      const double counts = mix * batch.Weight(t);
      const double turning = has_norms ? Turning(batch, t) : 0;
      for (size_t i = 0; i < k; ++i) {
        const auto e = static_cast<size_t>(order[i]);
        const double w = mass[e] * scale;
        sums.tokens[e] += counts;
        sums.weight[e] += counts * w;
        if (!has_norms) continue;
        const auto norm = static_cast<double>(batch.selected_norm[t * k + i]);
        sums.norm[e] += counts * norm;
        sums.weighted_norm[e] += counts * (w * norm);
        sums.norm_squared[e] += counts * (norm * norm);
        sums.turning_norm[source][e] += batch.Weight(t) * turning * (w * norm);
      }
    }
  }
  return sums;
}

}  // namespace winnow
