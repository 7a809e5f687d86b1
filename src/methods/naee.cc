#include "methods/naee.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "base/error.h"
#include "base/units.h"
#include "methods/naee_search.h"
#include "methods/router_ranking.h"

namespace winnow {
namespace {

// Every subset of `size` of 0..n-1 in lexicographic order.
std::vector<std::vector<int32_t>> Subsets(int64_t n, int64_t size) {
  std::vector<std::vector<int32_t>> all;
  std::vector<int32_t> current(static_cast<size_t>(size));
  std::iota(current.begin(), current.end(), 0);
  for (;;) {
    all.push_back(current);
    int64_t i = size - 1;
    while (i >= 0 && current[static_cast<size_t>(i)] == n - size + i) --i;
    if (i < 0) return all;
    ++current[static_cast<size_t>(i)];
    for (int64_t j = i + 1; j < size; ++j) {
      current[static_cast<size_t>(j)] = current[static_cast<size_t>(j - 1)] + 1;
    }
  }
}

// A batch prepared for many subsets: per token the experts by falling score and what the intact
// router does.
class Batch {
 public:
  Batch(const StatsInfo& info, NaeeObjective objective, int64_t num_experts, int64_t num_dropped,
        bool has_target)
      : objective_(objective),
        experts_(num_experts),
        k_(info.num_experts_per_tok),
        ranked_(std::min(num_experts, k_ + num_dropped)),
        normalize_(info.norm_topk_prob),
        epsilon_(info.normalize_epsilon),
        has_target_(has_target) {
    TabulateSelections(BinomialCoefficient(num_experts, num_dropped));
  }

  void Prepare(const TokenRecords& records, ThreadPool& pool) {
    records_ = &records;
    const auto n = static_cast<size_t>(records.num_tokens);
    order_.resize(n * static_cast<size_t>(ranked_));
    mass_.resize(n * static_cast<size_t>(experts_));
    intact_norm_.resize(n);
    factor_.resize(n);
    selection_error_.resize(n * selections_.size());
    constexpr size_t kTokens = 256;
    pool.Run(static_cast<int64_t>((n + kTokens - 1) / kTokens), [&](int64_t task, int) {
      const size_t first = static_cast<size_t>(task) * kTokens;
      RankTokens(records, first, std::min(n, first + kTokens));
    });
  }

  // Sum over the batch's tokens of the weighted squared error with experts `dropped` gone. `gone`
  // flags them.
  double SquaredError(const std::vector<int32_t>& dropped, const std::vector<uint8_t>& gone) const {
    double sum = 0;
    for (int64_t t = 0; t < records_->num_tokens; ++t) {
      const auto token = static_cast<size_t>(t);
      sum += factor_[token] *
             (selections_.empty() ? TokenError(token, dropped, gone) : TabledError(token, gone));
    }
    return sum;
  }

 private:
  static constexpr size_t kMaxSelected = 128;  // far above any family's k
  static constexpr int64_t kMaxTabledRanks = 12;

  // With renormalisation a token's error depends on its new experts alone, which are k of its first
  // k + dropped ranks: often far fewer cases than subsets. Each is computed once and looked up.
  void TabulateSelections(uint64_t num_subsets) {
    if (!normalize_ || ranked_ > kMaxTabledRanks ||
        BinomialCoefficient(ranked_, k_) > num_subsets) {
      return;
    }
    selection_of_mask_.assign(size_t{1} << ranked_, 0);
    for (const std::vector<int32_t>& ranks : Subsets(ranked_, k_)) {
      selections_.push_back(ranks);
    }
    for (size_t mask = 0; mask < selection_of_mask_.size(); ++mask) {
      std::vector<int32_t> ranks;  // the first k that the mask does not remove
      for (int32_t rank = 0; rank < ranked_ && std::ssize(ranks) < k_; ++rank) {
        if ((mask >> rank & 1) == 0) ranks.push_back(rank);
      }
      const auto at = std::find(selections_.begin(), selections_.end(), ranks);
      selection_of_mask_[mask] = static_cast<uint16_t>(at - selections_.begin());
    }
  }

  double TabledError(size_t t, const std::vector<uint8_t>& gone) const {
    const int32_t* order = order_.data() + t * static_cast<size_t>(ranked_);
    size_t mask = 0;
    for (int64_t rank = 0; rank < ranked_; ++rank) {
      mask |= static_cast<size_t>(gone[static_cast<size_t>(order[rank])]) << rank;
    }
    return selection_error_[t * selections_.size() + selection_of_mask_[mask]];
  }

  void RankTokens(const TokenRecords& records, size_t first, size_t end) {
    std::vector<int32_t> order(static_cast<size_t>(experts_));
    std::array<int32_t, kMaxSelected> selected;
    for (size_t t = first; t < end; ++t) {
      const auto experts = static_cast<size_t>(experts_);
      const std::span logits = std::span(records.router_logits).subspan(t * experts, experts);
      RankExperts(logits, ranked_, std::span(order));
      std::copy_n(order.begin(), ranked_,
                  order_.begin() + static_cast<std::ptrdiff_t>(t * static_cast<size_t>(ranked_)));
      const std::span mass = std::span(mass_).subspan(t * experts, experts);
      SoftmaxOfLogits(logits, order[0], mass);
      // |z|^2, the whole error of a token whose weights are all scaled by the same factor.
      if (!has_target_ && (!normalize_ || objective_ == NaeeObjective::kOutput)) {
        double norm = 0;
        for (int64_t i = 0; i < k_; ++i) {
          for (int64_t j = 0; j < k_; ++j) {
            const int32_t a = Ranked(t, i), b = Ranked(t, j);
            norm += mass[static_cast<size_t>(a)] * mass[static_cast<size_t>(b)] * Gram(t, a, b);
          }
        }
        intact_norm_[t] = norm;
      }
      double output =
          has_target_ ? static_cast<double>(records.target_norm_squared[t]) : intact_norm_[t];
      if (!has_target_ && normalize_ && objective_ == NaeeObjective::kOutput) {
        double used = 0;
        for (int64_t i = 0; i < k_; ++i) used += mass[static_cast<size_t>(Ranked(t, i))];
        output /= (used + epsilon_) * (used + epsilon_);
      }
      factor_[t] =
          records.Weight(t) *
          TokenFactor(objective_, output, static_cast<double>(records.stream_norm_squared[t]));
      for (size_t i = 0; i < selections_.size(); ++i) {
        for (size_t j = 0; j < selections_[i].size(); ++j)
          selected[j] = Ranked(t, selections_[i][j]);
        const bool intact = i == 0 && !has_target_;  // the first k ranks: nothing changes
        selection_error_[t * selections_.size() + i] =
            intact ? 0.0
                   : SelectionError(t, std::span(selected).first(static_cast<size_t>(k_)), 1.0);
      }
    }
  }

  int32_t Ranked(size_t t, int64_t rank) const {
    return order_[t * static_cast<size_t>(ranked_) + static_cast<size_t>(rank)];
  }
  double Gram(size_t t, int32_t a, int32_t b) const {
    const int64_t i = std::min(a, b), j = std::max(a, b);
    const auto pairs = static_cast<size_t>(experts_ * (experts_ + 1) / 2);
    const auto at = static_cast<size_t>(i * experts_ - i * (i - 1) / 2 + (j - i));
    return static_cast<double>(records_->gram[t * pairs + at]);
  }

  double TokenError(size_t t, const std::vector<int32_t>& dropped,
                    const std::vector<uint8_t>& gone) const {
    const double* mass = mass_.data() + t * static_cast<size_t>(experts_);
    bool hit = false;
    for (int64_t i = 0; i < k_; ++i) hit = hit || gone[static_cast<size_t>(Ranked(t, i))] != 0;
    double left = 1.0;  // softmax mass of the survivors
    if (!normalize_) {
      for (const int32_t e : dropped) left -= mass[e];
    }
    if (!hit && !has_target_) {
      // The same experts; without renormalisation their weights all grow by 1 / left.
      if (normalize_) return 0.0;
      const double growth = 1.0 / left - 1.0;
      return growth * growth * intact_norm_[t];
    }
    std::array<int32_t, kMaxSelected> selected;
    for (int64_t rank = 0, found = 0; found < k_; ++rank) {
      const int32_t e = Ranked(t, rank);
      if (gone[static_cast<size_t>(e)] == 0) selected[static_cast<size_t>(found++)] = e;
    }
    return SelectionError(t, std::span(selected).first(static_cast<size_t>(k_)), left);
  }

  // The squared error of token t when its experts become `selected`; `left` is the softmax mass of
  // all survivors.
  double SelectionError(size_t t, std::span<const int32_t> selected, double left) const {
    const double* mass = mass_.data() + t * static_cast<size_t>(experts_);
    // Terms of the quadratic form: coefficient per expert.
    std::array<int32_t, 2 * kMaxSelected> expert;
    std::array<double, 2 * kMaxSelected> coefficient;
    size_t terms = 0;
    double selected_mass = 0;
    for (const int32_t e : selected) {
      expert[terms] = e;
      coefficient[terms++] = mass[e];
      selected_mass += mass[e];
    }
    const double scale = normalize_ ? 1.0 / (selected_mass + epsilon_) : 1.0 / left;
    for (size_t i = 0; i < terms; ++i) coefficient[i] *= scale;
    double error = 0;
    if (has_target_) {
      error = static_cast<double>(records_->target_norm_squared[t]);
      for (size_t i = 0; i < terms; ++i) {
        error -= 2 * coefficient[i] *
                 static_cast<double>(records_->target_dot[t * static_cast<size_t>(experts_) +
                                                          static_cast<size_t>(expert[i])]);
      }
    } else {
      double intact_mass = 0;
      for (int64_t i = 0; i < k_; ++i) intact_mass += mass[Ranked(t, i)];
      const double intact_scale = normalize_ ? 1.0 / (intact_mass + epsilon_) : 1.0;
      for (int64_t i = 0; i < k_; ++i) {  // subtract the intact weights
        const int32_t e = Ranked(t, i);
        const double w = mass[e] * intact_scale;
        size_t at = 0;
        while (at < terms && expert[at] != e) ++at;
        if (at == terms) {
          expert[terms] = e;
          coefficient[terms++] = -w;
        } else {
          coefficient[at] -= w;
        }
      }
    }
    for (size_t i = 0; i < terms; ++i) {
      error += coefficient[i] * coefficient[i] * Gram(t, expert[i], expert[i]);
      for (size_t j = i + 1; j < terms; ++j) {
        error += 2 * coefficient[i] * coefficient[j] * Gram(t, expert[i], expert[j]);
      }
    }
    return std::max(error, 0.0);
  }

  NaeeObjective objective_;
  int64_t experts_, k_, ranked_;
  bool normalize_;
  double epsilon_;
  bool has_target_;
  const TokenRecords* records_ = nullptr;
  std::vector<int32_t> order_;                    // [n, ranked] experts by falling logit
  std::vector<double> mass_;                      // [n, E] softmax
  std::vector<std::vector<int32_t>> selections_;  // tabled: the k ranks in use
  std::vector<uint16_t> selection_of_mask_;       // by bit mask of removed ranks
  std::vector<double> selection_error_;           // [n, selections]
  std::vector<double> intact_norm_;               // [n]
  std::vector<double> factor_;                    // [n]
};

// The loss of each set of experts to drop, all of one size.
std::vector<double> SubsetLosses(const LayerStatsReader& records, const StatsInfo& info,
                                 const StatsLayer& layer, NaeeObjective objective,
                                 const std::vector<std::vector<int32_t>>& subsets, ThreadPool& pool,
                                 const JobControl& control) {
  std::vector<double> loss(subsets.size());
  Batch batch(info, objective, layer.num_experts, std::ssize(subsets.front()),
              records.has_target());
  TokenRecords tokens;
  for (const StatsBatch& each : info.Batches()) {
    control.Poll();
    if (each.mix == 0) continue;
    records.ReadTokens(each.first_token, each.num_tokens, tokens);
    batch.Prepare(tokens, pool);
    pool.Run(std::ssize(subsets), [&](int64_t i, int) {
      const auto at = static_cast<size_t>(i);
      std::vector<uint8_t> gone(static_cast<size_t>(layer.num_experts));
      for (const int32_t e : subsets[at]) gone[static_cast<size_t>(e)] = 1;
      loss[at] += each.mix * BatchLoss(objective, batch.SquaredError(subsets[at], gone));
    });
  }
  return loss;
}

// `second`: the loss of the next best set, infinite if there is none.
LayerPlan MakeLayerPlan(const StatsLayer& layer, const std::vector<int32_t>& kept, double loss,
                        double second) {
  if (!std::isfinite(loss)) {
    throw ModelError(fmt::format("layer {}: the statistics are not finite", layer.layer),
                     "the weights hold NaN or Inf: see winnow doctor MODEL");
  }
  LayerPlan plan;
  plan.layer = layer.layer;
  plan.num_experts = layer.num_experts;
  plan.kept = kept;
  plan.dropped = OtherExperts(kept, layer.num_experts);
  plan.loss = loss;
  if (std::isfinite(second) && loss > 0) plan.margin = (second - loss) / loss;
  return plan;
}

}  // namespace

uint64_t BinomialCoefficient(int64_t n, int64_t k) {
  k = std::min(k, n - k);
  if (k < 0) return 0;
  uint64_t result = 1;
  for (int64_t i = 1; i <= k; ++i) {
    const auto factor = static_cast<uint64_t>(n - k + i);
    if (result > std::numeric_limits<uint64_t>::max() / factor) {
      return std::numeric_limits<uint64_t>::max();
    }
    result = result * factor / static_cast<uint64_t>(i);
  }
  return result;
}

SubsetSearch ResolveSearch(const NaeeOptions& options, const StatsLayer& layer) {
  if (options.search != SubsetSearch::kAuto) return options.search;
  return BinomialCoefficient(layer.num_experts, options.keep) <= kMaxSubsets
             ? SubsetSearch::kEnumerate
             : SubsetSearch::kEliminate;
}

uint64_t NaeeBytes(const StatsInfo& info, const NaeeOptions& options) {
  int64_t largest_batch = 0;
  for (const int64_t tokens : info.BatchTokens()) largest_batch = std::max(largest_batch, tokens);
  uint64_t largest = 0;
  for (const StatsLayer& layer : info.layers) {
    const int64_t experts = layer.num_experts;
    uint64_t bytes = static_cast<uint64_t>(largest_batch) *
                     static_cast<uint64_t>(experts * (experts + 1) / 2 * 4 + experts * 20);
    if (ResolveSearch(options, layer) == SubsetSearch::kEliminate) {
      bytes += NaeeSearchBytes(info, layer);
    }
    largest = std::max(largest, bytes);
  }
  return largest;
}

void CheckNaee(const StatsInfo& info, const NaeeOptions& options) {
  const int64_t keep = options.keep;
  if (info.level != StatsLevel::kFull) {
    throw UsageError(
        fmt::format("NAEE needs the outputs of all experts; these statistics have level {}",
                    StatsLevelName(info.level)),
        "observe again with --stats full");
  }
  if (keep < info.num_experts_per_tok) {
    throw UsageError(
        fmt::format("--keep {}: each token uses {} experts", keep, info.num_experts_per_tok),
        "keep at least num_experts_per_tok experts");
  }
  if (info.num_experts_per_tok > 128) throw UsageError("more than 128 experts per token");
  if (info.progressive_keep && *info.progressive_keep != keep) {
    throw UsageError(
        fmt::format("these progressive statistics are for --keep {}, not {}",
                    *info.progressive_keep, keep),
        "progressive pruning chooses while it observes: observe again with this --keep");
  }
  CheckGuarded(options);
  for (const StatsLayer& layer : info.layers) {
    if (keep >= layer.num_experts) {
      throw UsageError(fmt::format("--keep {}: layer {} has {} experts, so none would go", keep,
                                   layer.layer, layer.num_experts));
    }
    const uint64_t subsets = BinomialCoefficient(layer.num_experts, keep);
    if (options.search == SubsetSearch::kEnumerate && subsets > kMaxSubsets) {
      throw UsageError(
          fmt::format(
              "keeping {} of {} experts means {} subsets a layer, more than the {} that are "
              "enumerated",
              keep, layer.num_experts, subsets == UINT64_MAX ? "over 10^19" : FormatCount(subsets),
              kMaxSubsets),
          "keep more experts, or leave out --search: elimination and exchanges need no "
          "enumeration");
    }
  }
}

double NaeeLoss(const LayerStatsReader& records, const StatsInfo& info, const StatsLayer& layer,
                const std::vector<int32_t>& kept, NaeeObjective objective, ThreadPool& pool,
                const JobControl& control) {
  return SubsetLosses(records, info, layer, objective, {OtherExperts(kept, layer.num_experts)},
                      pool, control)
      .front();
}

std::vector<OutputLoss> LossOfOutput(const LayerStatsReader& records, const StatsInfo& info,
                                     const StatsLayer& layer, const std::vector<int32_t>& kept,
                                     ThreadPool& pool, const JobControl& control) {
  const std::vector<int32_t> dropped = OtherExperts(kept, layer.num_experts);
  std::vector<uint8_t> gone(static_cast<size_t>(layer.num_experts));
  for (const int32_t e : dropped) gone[static_cast<size_t>(e)] = 1;
  std::vector<OutputLoss> losses(info.sources.size());
  Batch batch(info, NaeeObjective::kOutput, layer.num_experts, std::ssize(dropped),
              records.has_target());
  TokenRecords tokens;
  for (const StatsBatch& each : info.Batches()) {
    control.Poll();
    records.ReadTokens(each.first_token, each.num_tokens, tokens);
    OutputLoss& loss = losses[each.source];
    for (size_t t = 0; t < static_cast<size_t>(tokens.num_tokens); ++t) {
      loss.weight += tokens.Weight(t);
    }
    if (dropped.empty()) continue;
    batch.Prepare(tokens, pool);
    loss.sum += batch.SquaredError(dropped, gone);
  }
  return losses;
}

void CheckGuarded(const NaeeOptions& options) {
  for (const auto& [layer, experts] : options.guarded) {
    if (std::ssize(experts) <= options.keep) continue;
    throw UsageError(fmt::format("--keep {}: layer {} has {} experts with huge activations",
                                 options.keep, layer, experts.size()),
                     "keep more, or leave them without their guard: --no-guard");
  }
}

std::vector<int32_t> GuardedIn(const GuardedExperts& guarded, const StatsLayer& layer) {
  const auto found = guarded.find(layer.layer);
  return found == guarded.end() ? std::vector<int32_t>() : found->second;
}

LayerPlan ChooseNaee(const LayerStatsReader& records, const StatsInfo& info,
                     const StatsLayer& layer, const NaeeOptions& options, ThreadPool& pool,
                     const JobControl& control) {
  if (ResolveSearch(options, layer) == SubsetSearch::kEliminate) {
    const NaeeSet found = SearchNaee(
        records, info, layer,
        {options.objective, options.memory_budget_bytes, GuardedIn(options.guarded, layer)},
        options.keep, pool, control);
    return MakeLayerPlan(layer, found.kept, found.loss, found.next_loss);
  }
  std::vector<std::vector<int32_t>> subsets =
      Subsets(layer.num_experts, layer.num_experts - options.keep);
  for (const int32_t guarded : GuardedIn(options.guarded, layer)) {
    std::erase_if(subsets, [&](const std::vector<int32_t>& dropped) {
      return std::binary_search(dropped.begin(), dropped.end(), guarded);
    });
  }
  const std::vector<double> loss =
      SubsetLosses(records, info, layer, options.objective, subsets, pool, control);
  size_t best = 0;
  for (size_t i = 1; i < loss.size(); ++i) {
    if (loss[i] < loss[best]) best = i;
  }
  double second = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < loss.size(); ++i) {
    if (i != best) second = std::min(second, loss[i]);
  }
  return MakeLayerPlan(layer, OtherExperts(subsets[best], layer.num_experts), loss[best], second);
}

}  // namespace winnow
