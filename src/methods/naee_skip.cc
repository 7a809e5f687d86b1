#include "methods/naee_skip.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <span>

#include "base/error.h"
#include "methods/router_ranking.h"

namespace winnow {
namespace {

constexpr int64_t kBins = 400;

// One rank of one token that could be skipped.
struct Rank {
  float ratio = 0;   // p(i) / p(1)
  float error = 0;   // what skipping it adds, once the ranks behind it are skipped; relative
  float weight = 1;  // what its token counts for
};

// Consecutive ranks of a layer, by rising ratio, whose mean error is the price of skipping them.
struct Step {
  size_t layer = 0;
  int64_t first = 0, count = 0;
  double weight = 0;  // of them all
  double error = 0;   // mean
};

// p(i) / p(1) in f32, as the run-time rule sees it.
void Ratios(std::span<const float> logits, int64_t k, std::vector<int32_t>& order,
            std::vector<float>& ratios) {
  RankExperts(logits, k, std::span(order));
  const auto best = static_cast<double>(logits[static_cast<size_t>(order[0])]);
  for (int64_t i = 0; i < k; ++i) {
    const auto logit =
        static_cast<double>(logits[static_cast<size_t>(order[static_cast<size_t>(i)])]);
    ratios[static_cast<size_t>(i)] = static_cast<float>(std::exp(logit - best));
  }
}

// The median as NumPy and PyTorch's quantile give it: the mean of the two in the middle. With
// weights the first value that half of the weight does not exceed.
double Median(std::vector<float>& values, const std::vector<double>& weights) {
  if (std::adjacent_find(weights.begin(), weights.end(), std::not_equal_to<>()) != weights.end()) {
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return values[a] < values[b]; });
    double left = std::accumulate(weights.begin(), weights.end(), 0.0) / 2;
    for (const size_t i : order) {
      left -= weights[i];
      if (left <= 0) return static_cast<double>(values[i]);
    }
  }
  const size_t half = values.size() / 2;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(half),
                   values.end());
  const auto high = static_cast<double>(values[half]);
  if (values.size() % 2 == 1) return high;
  const auto low = static_cast<double>(
      *std::max_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(half)));
  return (low + high) / 2;
}

LayerPlan AllExperts(const StatsLayer& layer) {
  LayerPlan plan;
  plan.layer = layer.layer;
  plan.num_experts = layer.num_experts;
  plan.kept.resize(static_cast<size_t>(layer.num_experts));
  std::iota(plan.kept.begin(), plan.kept.end(), 0);
  return plan;
}

double MedianBeta(const LayerStatsReader& records, const StatsInfo& info, const StatsLayer& layer,
                  const JobControl& control) {
  const auto experts = static_cast<size_t>(layer.num_experts);
  const int64_t k = info.num_experts_per_tok;
  std::vector<int32_t> order(experts);
  std::vector<float> ratios(static_cast<size_t>(k)), last;
  std::vector<double> weights;
  RoutingRecords batch;
  for (const StatsBatch& each : info.Batches()) {
    const int64_t first = each.first_token, num_tokens = each.num_tokens;
    const double mix = each.mix;
    control.Poll();
    records.ReadRouting(first, num_tokens, batch);
    for (size_t t = 0; t < static_cast<size_t>(num_tokens); ++t) {
      Ratios(std::span(batch.router_logits).subspan(t * experts, experts), k, order, ratios);
      last.push_back(ratios.back());
      weights.push_back(mix * batch.Weight(t));
    }
  }
  return Median(last, weights);
}

// The ranks 2..k of every token of a layer with their errors, by rising ratio.
std::vector<Rank> SortedRanks(const LayerStatsReader& records, const StatsInfo& info,
                              const StatsLayer& layer, ThreadPool& pool,
                              const JobControl& control) {
  const auto experts = static_cast<size_t>(layer.num_experts);
  const auto k = static_cast<size_t>(info.num_experts_per_tok);
  const size_t pairs = experts * (experts + 1) / 2;
  std::vector<Rank> ranks(static_cast<size_t>(info.num_tokens()) * (k - 1));
  TokenRecords batch;
  for (const StatsBatch& each : info.Batches()) {
    const int64_t first = each.first_token, num_tokens = each.num_tokens;
    const double mix = each.mix;
    control.Poll();
    records.ReadTokens(first, num_tokens, batch);
    constexpr int64_t kTokens = 64;
    pool.Run((num_tokens + kTokens - 1) / kTokens, [&](int64_t task, int) {
      std::vector<int32_t> order(experts);
      std::vector<float> ratios(k);
      std::vector<double> mass(experts), change(k), error(k + 1);
      for (int64_t t = task * kTokens; t < std::min(num_tokens, (task + 1) * kTokens); ++t) {
        const auto at = static_cast<size_t>(t);
        const std::span logits = std::span(batch.router_logits).subspan(at * experts, experts);
        Ratios(logits, info.num_experts_per_tok, order, ratios);
        SoftmaxOfLogits(logits, order[0], mass);
        const float* gram = batch.gram.data() + at * pairs;
        const auto product = [&](size_t a, size_t b) {
          const auto i = static_cast<size_t>(std::min(order[a], order[b]));
          const auto j = static_cast<size_t>(std::max(order[a], order[b]));
          return static_cast<double>(gram[i * experts - i * (i - 1) / 2 + (j - i)]);
        };
        const auto scale = [&](size_t used) {
          if (!info.norm_topk_prob) return 1.0;
          double sum = info.normalize_epsilon;
          for (size_t i = 0; i < used; ++i) sum += mass[static_cast<size_t>(order[i])];
          return 1 / sum;
        };
        const double stream = static_cast<double>(batch.stream_norm_squared[at]);
        error[k] = 0;
        for (size_t used = k - 1; used >= 1; --used) {  // the first `used` ranks are run
          const double intact = scale(k), left = scale(used);
          for (size_t i = 0; i < k; ++i) {
            change[i] = mass[static_cast<size_t>(order[i])] * (intact - (i < used ? left : 0.0));
          }
          double sum = 0;
          for (size_t i = 0; i < k; ++i) {
            sum += change[i] * change[i] * product(i, i);
            for (size_t j = i + 1; j < k; ++j) sum += 2 * change[i] * change[j] * product(i, j);
          }
          error[used] = stream > 0 ? std::max(sum, 0.0) / stream : 0.0;
          Rank& rank = ranks[(static_cast<size_t>(first + t)) * (k - 1) + used - 1];
          rank.ratio = ratios[used];
          rank.error = static_cast<float>(error[used] - error[used + 1]);
          rank.weight = static_cast<float>(mix * batch.Weight(at));
        }
      }
    });
  }
  std::stable_sort(ranks.begin(), ranks.end(),
                   [](const Rank& a, const Rank& b) { return a.ratio < b.ratio; });
  return ranks;
}

// Bins of equal size whose mean errors rise: neighbours that would fall are joined.
void AddSteps(const std::vector<Rank>& ranks, size_t layer, std::vector<Step>& steps) {
  const auto n = static_cast<int64_t>(ranks.size());
  std::vector<Step> rising;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    const int64_t first = n * bin / kBins, end = n * (bin + 1) / kBins;
    if (first == end) continue;
    Step step{layer, first, end - first, 0, 0};
    for (int64_t i = first; i < end; ++i) {
      const Rank& rank = ranks[static_cast<size_t>(i)];
      step.error += static_cast<double>(rank.weight) * static_cast<double>(rank.error);
      step.weight += static_cast<double>(rank.weight);
    }
    if (step.weight > 0) step.error /= step.weight;
    while (!rising.empty() && rising.back().error >= step.error) {
      const Step& before = rising.back();
      const double weight = before.weight + step.weight;
      if (weight > 0) {
        step.error = (before.error * before.weight + step.error * step.weight) / weight;
      }
      step.first = before.first;
      step.count += before.count;
      step.weight = weight;
      rising.pop_back();
    }
    rising.push_back(step);
  }
  steps.insert(steps.end(), rising.begin(), rising.end());
}

}  // namespace

void CheckNaeeSkip(const StatsInfo& info, const std::optional<SkipBudget>& budget) {
  const auto k = static_cast<double>(info.num_experts_per_tok);
  if (info.num_experts_per_tok < 2) {
    throw UsageError("each token uses one expert, so none can be skipped",
                     "remove experts instead: --method naee --keep R");
  }
  if (info.num_tokens() < 1) throw UsageError("the statistics have no tokens");
  if (!budget) return;
  if (info.level != StatsLevel::kFull) {
    throw UsageError(
        fmt::format("a budget for skipping needs the outputs of all experts; these statistics have "
                    "level {}",
                    StatsLevelName(info.level)),
        "observe again with --stats full, or leave out --active and --max-error");
  }
  if (budget->active_experts && !(*budget->active_experts >= 1 && *budget->active_experts <= k)) {
    throw UsageError(fmt::format("--active {}: a token runs 1 to {} experts",
                                 *budget->active_experts, info.num_experts_per_tok),
                     "give a mean between them, e.g. three quarters of the most");
  }
}

uint64_t NaeeSkipBytes(const StatsInfo& info) {
  int64_t experts = 0, largest_batch = 0;
  for (const StatsLayer& layer : info.layers) experts = std::max(experts, layer.num_experts);
  for (const int64_t tokens : info.BatchTokens()) largest_batch = std::max(largest_batch, tokens);
  // The ranks of a layer twice while they are sorted, those of all layers, and a batch of records.
  return static_cast<uint64_t>(info.num_tokens()) *
             static_cast<uint64_t>(info.num_experts_per_tok) * sizeof(Rank) *
             (2 + info.layers.size()) +
         static_cast<uint64_t>(largest_batch) *
             static_cast<uint64_t>(experts * (experts + 1) / 2 + 3 * experts) * sizeof(float);
}

std::vector<LayerPlan> ChooseNaeeSkip(const fs::path& stats, const StatsInfo& info,
                                      const std::optional<SkipBudget>& budget, ThreadPool& pool,
                                      const JobControl& control) {
  std::vector<LayerPlan> plans;
  std::vector<std::vector<Rank>> ranks;
  std::vector<Step> steps;
  for (const StatsLayer& layer : info.layers) {
    const LayerStatsReader records(stats, info, layer);
    plans.push_back(AllExperts(layer));
    if (!budget) {
      plans.back().beta = MedianBeta(records, info, layer, control);
      continue;
    }
    ranks.push_back(SortedRanks(records, info, layer, pool, control));
    AddSteps(ranks.back(), ranks.size() - 1, steps);
  }
  if (!budget) return plans;
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.error < b.error; });
  // What the tokens count for: each has a rank for every expert after its first.
  double tokens = 0;
  for (const Rank& rank : ranks.front()) tokens += static_cast<double>(rank.weight);
  tokens /= static_cast<double>(info.num_experts_per_tok - 1);
  double skips = std::numeric_limits<double>::infinity();
  if (budget->active_experts) {
    skips = (static_cast<double>(info.num_experts_per_tok) - *budget->active_experts) * tokens *
            static_cast<double>(info.layers.size());
  }
  double error =
      budget->max_error ? *budget->max_error * tokens : std::numeric_limits<double>::infinity();
  std::vector<int64_t> skipped(ranks.size());
  if (budget->quantile) {
    steps.clear();
    for (size_t i = 0; i < ranks.size(); ++i) {
      double left = *budget->quantile * tokens * static_cast<double>(info.num_experts_per_tok - 1);
      for (const Rank& rank : ranks[i]) {
        left -= static_cast<double>(rank.weight);
        if (left < 0) break;
        ++skipped[i];
      }
    }
  }
  for (const Step& step : steps) {
    double allowed = skips;
    if (step.error > 0) allowed = std::min(allowed, error / step.error);
    double weight = 0;
    int64_t count = 0;
    for (; count < step.count; ++count) {
      const Rank& rank = ranks[step.layer][static_cast<size_t>(step.first + count)];
      const double next = weight + static_cast<double>(rank.weight);
      if (next > allowed) break;
      weight = next;
    }
    skipped[step.layer] += count;
    skips -= weight;
    error -= step.error * weight;
    if (count < step.count) break;
  }
  for (size_t i = 0; i < plans.size(); ++i) {
    const std::vector<Rank>& layer = ranks[i];
    const auto count = static_cast<size_t>(skipped[i]);
    // Between the last rank that is skipped and the first that is run, out of rounding's reach.
    plans[i].beta = count == 0              ? 0.0
                    : count == layer.size() ? 1.0
                                            : (static_cast<double>(layer[count - 1].ratio) +
                                               static_cast<double>(layer[count].ratio)) /
                                                  2;
    double sum = 0;
    for (size_t r = 0; r < count; ++r) {
      sum += static_cast<double>(layer[r].weight) * static_cast<double>(layer[r].error);
    }
    plans[i].loss = sum / tokens;
  }
  return plans;
}

}  // namespace winnow
