#include "mixing.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "base/units.h"
#include "condensing.h"
#include "healing.h"
#include "methods/layer_budget.h"
#include "observe/layer_stats.h"

namespace winnow::cli {
namespace {

// Tokens on which the layers' weights are measured.
constexpr int64_t kSensitivityTokens = 12288;

void CheckMix(const StatsInfo& info, const CondenseStats& neurons, const Model& model) {
  CheckCondenseStats(neurons, model);
  if (neurons.method != "condense") {
    throw UsageError("--with takes statistics of observe --method condense",
                     "observe the model with --method condense");
  }
  if (info.model_fingerprint != neurons.model_fingerprint) {
    throw UsageError("the two statistics are of different models", "observe the same model twice");
  }
  if (info.level != StatsLevel::kFull || info.progressive_keep) {
    throw UsageError("--method mix needs full statistics, not progressive ones",
                     "observe with --stats full");
  }
  for (const StatsLayer& layer : info.layers) {
    if (!layer.as_if_kept.empty()) {
      throw UsageError("--method mix plans for the model as it is", "observe without --plan");
    }
  }
}

// Sequences spread over the whole text, about so many tokens of them.
TokenSet Thinned(const TokenSet& tokens, int64_t target) {
  TokenSet some;
  const int64_t every = std::max<int64_t>(1, tokens.num_tokens() / target);
  for (int64_t s = 0; s < tokens.num_sequences(); s += every) {
    some.Append(std::span(tokens.ids)
                    .subspan(static_cast<size_t>(tokens.offsets[static_cast<size_t>(s)]),
                             static_cast<size_t>(tokens.length(s))));
  }
  return some;
}

// How much an error of each layer moves the next-token distribution: KL of the logits with that
// layer condensed to a sixth of its experts, not refitted, by the error that leaves of its stream.
std::vector<double> Sensitivities(Session& session, const Model& model,
                                  const CondenseStats& neurons, const std::string& neuron_stats,
                                  const std::string& spill_folder) {
  const TokenSet tokens = Thinned(ReadSearchTokens(neuron_stats, neurons), kSensitivityTokens);
  const auto width_of = [&](const CondenseLayer& layer) {
    return std::min(neurons.max_experts, std::max<int64_t>(1, layer.num_experts / 6));
  };
  const LayerSearchOptions options{.compute = session.compute(),
                                   .memory_budget_bytes = session.memory_budget(),
                                   .spill_folder = spill_folder};
  const LayerSearchPlan plan =
      PlanLayerSearch(model, tokens, options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "plan");
  const CondenseWeights condense = [&](int64_t moe_layer, const LayerWeights& intact) {
    const CondenseLayer& layer = neurons.layers[static_cast<size_t>(moe_layer)];
    return CondensedWeightsOf(CondensedOf(neurons, layer, width_of(layer), model.config()),
                              layer.layer, intact, model);
  };
  std::vector<double> sensitivities =
      SingleLayerKl(model, tokens, condense, options, plan, session.pool(), session.control());
  session.FinishProgress();
  for (size_t i = 0; i < sensitivities.size(); ++i) {
    const CondenseLayer& layer = neurons.layers[i];
    const double error = layer.width_fold_errors[static_cast<size_t>(width_of(layer))];
    sensitivities[i] = error > 0 ? std::max(sensitivities[i], 0.0) / error : 0.0;
  }
  return sensitivities;
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

int64_t TotalWithin(const Model& model, const StatsInfo& info, const std::string& size) {
  const uint64_t bytes = ParseBytes(size, "--size");
  uint64_t rest = model.checkpoint().total_bytes();
  for (const StatsLayer& layer : info.layers) {
    rest -= std::min(rest, layer.expert_bytes * static_cast<uint64_t>(layer.num_experts));
  }
  const uint64_t each = info.layers.front().expert_bytes;
  if (bytes < rest + each) {
    throw UsageError(
        fmt::format("--size {}: {} of the weights are not in experts", size, FormatBytes(rest)),
        "give a larger size");
  }
  return std::min(info.num_experts(),
                  static_cast<int64_t>((bytes - rest) / std::max<uint64_t>(each, 1)));
}

MixPlanner::MixPlanner(Session& session, const Model& model, const StatsInfo& info,
                       const fs::path& stats, const std::string& neuron_stats,
                       const std::string& spill_folder)
    : model_(model), info_(info), sensitivities_(info.layers.size(), 1.0) {
  NaeeOptions options{.keep = info.num_experts_per_tok};
  options.memory_budget_bytes = RequirePlanMemory(session, info, options);
  if (!neuron_stats.empty()) {
    neurons_ = ReadCondenseStats(neuron_stats);
    CheckMix(info, *neurons_, model);
    sensitivities_ = Sensitivities(session, model, *neurons_, neuron_stats, spill_folder);
  }
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const StatsLayer& layer = info.layers[i];
    const LayerStatsReader records(stats, info, layer);
    curves_.push_back(NaeeCurve(records, info, layer,
                                {NaeeObjective::kStream, options.memory_budget_bytes, {}},
                                info.num_experts_per_tok, session.pool(), session.control()));
    ReportPlanned(session, info, i);
  }
}

std::vector<std::vector<double>> MixPlanner::PruningCosts(const MixWeights& weights) const {
  std::vector<std::vector<double>> costs;
  for (size_t i = 0; i < info_.layers.size(); ++i) {
    costs.emplace_back(static_cast<size_t>(info_.layers[i].num_experts) + 1, kInfinity);
    costs.back().back() = 0;
    if (weights.pruning == kInfinity) continue;
    for (const NaeeSet& set : curves_[i]) {
      const double error = set.weight > 0 ? set.loss / set.weight : 0.0;
      costs.back()[set.kept.size()] = sensitivities_[i] * weights.pruning * error;
    }
  }
  return costs;
}

std::vector<std::vector<double>> MixPlanner::AllCosts(
    const std::vector<std::vector<double>>& pruned, const MixWeights& weights) const {
  std::vector<std::vector<double>> costs = pruned;
  if (!neurons_ || weights.condensing == kInfinity) return costs;
  for (size_t i = 0; i < costs.size(); ++i) {
    const std::vector<double>& widths = neurons_->layers[i].width_errors;
    const auto decoder_layer = static_cast<size_t>(info_.layers[i].layer);
    const bool shared = model_.config().layers[decoder_layer].shared_width > 0;
    for (size_t w = shared ? 0 : 1; w < std::min(costs[i].size(), widths.size()); ++w) {
      costs[i][w] = std::min(costs[i][w], sensitivities_[i] * weights.condensing * widths[w]);
    }
  }
  return costs;
}

CompressionPlan MixPlanner::Decide(int64_t total, const MixWeights& weights) const {
  const std::vector<std::vector<double>> pruned = PruningCosts(weights);
  const std::vector<std::vector<double>> costs = AllCosts(pruned, weights);
  const std::vector<int64_t> left = DivideSurvivors(costs, total);
  CompressionPlan plan;
  plan.method = "mix";
  plan.search = "least error for its bytes, layer by layer";
  plan.objective = neurons_ ? "error of the stream times its effect on the logits"
                            : NaeeObjectiveName(NaeeObjective::kStream);
  plan.model_type = info_.model_type;
  plan.model_fingerprint = info_.model_fingerprint;
  plan.target = "winnow";
  plan.sources = SourceNames(info_);
  plan.calibration_tokens = info_.num_tokens();
  plan.bytes_before = model_.checkpoint().total_bytes();
  for (size_t i = 0; i < info_.layers.size(); ++i) {
    const StatsLayer& layer = info_.layers[i];
    const auto count = static_cast<size_t>(left[i]);
    LayerPlan entry;
    entry.layer = layer.layer;
    entry.moe_layer = static_cast<int32_t>(i);
    entry.num_experts = layer.num_experts;
    entry.loss = costs[i][count];
    if (costs[i][count] < pruned[i][count]) {
      entry.condensed = CondensedOf(*neurons_, neurons_->layers[i], left[i], model_.config());
      entry.kept = entry.condensed->experts;
    } else if (left[i] == layer.num_experts) {
      entry.kept = OtherExperts({}, layer.num_experts);
    } else {
      entry.kept = curves_[i].at(static_cast<size_t>(layer.num_experts - 1 - left[i])).kept;
    }
    entry.dropped = OtherExperts(entry.kept, layer.num_experts);
    plan.layers.push_back(std::move(entry));
  }
  plan.bytes_after = PlanRewrite(model_, plan, {}).bytes_after;
  return plan;
}

CompressionPlan MakeMixedPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                              const MixChoice& choice, const std::vector<SourceBlocks>& calibration,
                              const fs::path& work) {
  const Model model = Model::Open(choice.model);
  if (!IsCondenseStats(choice.neuron_stats)) {
    throw UsageError(
        fmt::format("--with {}: not statistics of observe --method condense", choice.neuron_stats),
        "observe the model with --method condense");
  }
  const int64_t total = choice.total > 0 ? choice.total : TotalWithin(model, info, choice.size);
  if (total > info.num_experts()) {
    throw UsageError(fmt::format("--total {}: the model has {} experts over all layers", total,
                                 info.num_experts()),
                     "say how many are to be left");
  }
  const MixPlanner planner(session, model, info, stats, choice.neuron_stats, choice.spill_folder);
  if (calibration.empty()) return planner.Decide(total, {kHealedShare, 1});
  // Errors predict the nll of neither kind exactly: what each weighing gives is healed, and the one
  // with the least nll on sequences that no fit has seen is taken.
  struct Candidate {
    const char* name;
    MixWeights weights;
  };
  std::optional<CompressionPlan> best;
  double least = kInfinity;
  // Gone however this ends: what is healed here is only compared.
  struct Remove {
    const fs::path& folder;
    ~Remove() {
      std::error_code ignored;
      fs::remove_all(folder, ignored);
    }
  } const remove{work};
  for (const Candidate& candidate : {Candidate{"the mix", {kHealedShare, 1}},
                                     Candidate{"a mix that condenses more", {2 * kHealedShare, 1}},
                                     Candidate{"pruning alone", {kHealedShare, kInfinity}},
                                     Candidate{"condensing alone", {kInfinity, 1}}}) {
    std::optional<CompressionPlan> plan;
    try {
      plan = planner.Decide(total, candidate.weights);
    } catch (const UsageError&) {
      continue;  // this kind alone cannot fill the budget
    }
    const HealPlan heal = PrepareHeal(session, model, *plan, calibration);
    const Healing healing = Heal(session, model, *plan, heal, work);
    const double nll = std::min(healing.result.healed.nll, healing.result.pruned.nll);
    session.Note(fmt::format("{}: nll {:.4f} healed, intact {:.4f}", candidate.name, nll,
                             healing.result.intact.nll));
    if (nll < least) {
      least = nll;
      best = std::move(plan);
      best->search = fmt::format("{}, confirmed by nll after healing", candidate.name);
    }
  }
  return best.value();
}

}  // namespace winnow::cli
