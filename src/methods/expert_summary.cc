#include "methods/expert_summary.h"

#include <algorithm>
#include <cmath>
#include <numeric>

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
      const float* logits = batch.router_logits.data() + t * experts;
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(),
                        [&](int32_t a, int32_t b) {
                          return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
                        });
      double all = 0, used = 0;
      for (size_t e = 0; e < experts; ++e) {
        mass[e] = std::exp(static_cast<double>(logits[e]) - static_cast<double>(logits[order[0]]));
        all += mass[e];
      }
      for (size_t i = 0; i < k; ++i) used += mass[static_cast<size_t>(order[i])] / all;
      const double scale = (info.norm_topk_prob ? 1 / (used + info.normalize_epsilon) : 1.0) / all;
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
