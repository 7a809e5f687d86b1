#include "condensing.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "base/units.h"
#include "condense/layer_search.h"
#include "weights/fused_feed_forward.h"

namespace winnow::cli {
namespace {

constexpr int64_t kPublishedExperts = 6;

bool WholeExperts(const Model& model, int64_t width, int64_t most_neurons) {
  return std::any_of(
      model.config().layers.begin(), model.config().layers.end(), [&](const LayerConfig& layer) {
        return layer.is_moe && CandidateNeurons(model.config(), layer, width, most_neurons) == 0;
      });
}

// The paper's method rests on shared experts; without one a condensed layer has little left.
void WarnWithoutShared(Session& session, const Model& model) {
  for (const LayerConfig& layer : model.config().layers) {
    if (layer.is_moe && layer.shared_width == 0) {
      session.Warn(
          "the model has no shared expert: what is left of a condensed layer are a few experts "
          "with "
          "fixed weights, which CD-MoE's authors call poor; measure the result");
      return;
    }
  }
}

// The neurons of the first `width` experts' worth, by expert.
CondensePlanOfLayer ChosenNeurons(const CondenseLayer& layer, int64_t width, int64_t expert_width) {
  CondensePlanOfLayer condensed;
  std::map<int32_t, std::vector<int32_t>> rows;
  const auto count =
      std::min<size_t>(static_cast<size_t>(width * expert_width), layer.neuron_rows.size());
  for (size_t i = 0; i < count; ++i) rows[layer.neuron_experts[i]].push_back(layer.neuron_rows[i]);
  for (const double alpha : layer.width_alphas.at(static_cast<size_t>(width))) {
    condensed.alphas.push_back(alpha);
  }
  for (auto& [expert, neurons] : rows) {
    std::sort(neurons.begin(), neurons.end());
    condensed.experts.push_back(expert);
    condensed.neurons.push_back(std::move(neurons));
  }
  return condensed;
}

void CheckChoice(const CondenseStats& stats, const CondenseChoice& choice, const Model& model) {
  const int64_t num_layers = std::ssize(stats.layers);
  if (choice.experts > stats.max_experts) {
    const bool neurons = stats.method == "condense";
    throw UsageError(
        fmt::format("{} {}: the statistics hold the first {} of each layer",
                    neurons ? "--width" : "--experts", choice.experts, stats.max_experts),
        fmt::format("observe again with a larger {}", neurons ? "--width" : "--max-experts"));
  }
  if (choice.layers > num_layers) {
    throw UsageError(
        fmt::format("--layers {}: the model has {} MoE layers", choice.layers, num_layers),
        "ask for fewer");
  }
  for (const int32_t layer : choice.moe_layers) {
    if (layer < 0 || layer >= num_layers) {
      throw UsageError(
          fmt::format("--moe-layers: {} is not an index among {} MoE layers", layer, num_layers),
          "indices count MoE layers from 0");
    }
  }
  if (choice.experts == 0) {
    for (const CondenseLayer& layer : stats.layers) {
      if (model.config().layers[static_cast<size_t>(layer.layer)].shared_width == 0) {
        throw UsageError(fmt::format("{} 0 keeps the shared expert alone, and this model has none",
                                     stats.method == "condense" ? "--width" : "--experts"),
                         "keep at least one expert");
      }
    }
  }
}

// What observing gave: `layers` for programs, `table` for people.
int Report(Session& session, const CondenseStats& stats, const OrderedJson& layers,
           const std::string& table, const std::string& output, double seconds) {
  if (session.flags.json) {
    OrderedJson json = {{"schema", "winnow.observe/1"},
                        {"output", output},
                        {"method", stats.method},
                        {"search_tokens", stats.search_tokens}};
    if (stats.method == "cd-moe") json["alpha_tokens"] = stats.alpha_tokens;
    json.update(OrderedJson{
        {"layers", layers}, {"seconds", seconds}, {"peak_rss_bytes", PeakResidentBytes()}});
    session.PrintJson(json);
  } else {
    session.Print(table);
    session.Note(fmt::format("wrote {}", output));
    session.PrintUsage();
  }
  return 0;
}

int ReportNeurons(Session& session, const CondenseStats& stats, const std::string& output,
                  double seconds) {
  std::string table =
      "  layer  error of the layer, relative to its stream, with 0, 1, .. experts' worth of "
      "neurons\n";
  OrderedJson layers = OrderedJson::array();
  for (const CondenseLayer& layer : stats.layers) {
    std::string errors;
    for (const double error : layer.width_errors) errors += fmt::format("  {:.5f}", error);
    table += fmt::format("  {:>5}{}\n", layer.layer, errors);
    layers.push_back({{"layer", layer.layer}, {"width_errors", layer.width_errors}});
  }
  return Report(session, stats, layers, table, output, seconds);
}

}  // namespace

CondensedWeights CondensedWeightsOf(CondensePlanOfLayer condensed, int32_t layer,
                                    const LayerWeights& intact, const Model& model) {
  if (condensed.neurons.empty()) {
    std::vector<float> alphas;
    for (const double alpha : AlphasOf(condensed)) alphas.push_back(static_cast<float>(alpha));
    return {intact.Condensed(condensed.experts, alphas), {}};
  }
  LayerPlan plan;
  plan.layer = layer;
  plan.condensed = std::move(condensed);
  FusedFeedForward fused;
  LayerWeights weights = FusedLayer(intact, FusedParts(plan, model.config()), fused);
  return {std::move(weights), std::move(fused.storage)};
}

CondensePlanOfLayer CondensedOf(const CondenseStats& stats, const CondenseLayer& layer,
                                int64_t experts, const ModelConfig& config) {
  if (stats.method == "condense") {
    return ChosenNeurons(layer, experts,
                         config.layers[static_cast<size_t>(layer.layer)].expert_width);
  }
  CondensePlanOfLayer condensed;
  for (int32_t e = 0; e < layer.num_experts; ++e) condensed.alphas.push_back(layer.Alpha(e));
  for (int64_t i = 0; i < experts; ++i) {
    const GreedyStep& step = layer.steps[static_cast<size_t>(i)];
    condensed.experts.push_back(step.chosen);
    condensed.divergence.push_back(step.divergence);
    condensed.candidates.push_back(step.candidates);
  }
  return condensed;
}

int ObserveCondense(Session& session, const std::string& model_folder,
                    const CalibrationFlags& calibration, const CondenseFlags& flags,
                    const std::string& output) {
  const Model model = Model::Open(model_folder);
  if (!flags.neurons) WarnWithoutShared(session, model);
  const std::vector<SourceBlocks> search =
      LoadCalibration(session, model, model_folder, calibration);
  std::vector<SourceBlocks> alpha;
  if (!flags.alpha_calibration.empty()) {
    CalibrationFlags alpha_flags = calibration;
    alpha_flags.sources = flags.alpha_calibration;
    alpha = LoadCalibration(session, model, model_folder, alpha_flags);
  }
  int64_t fewest = kPublishedExperts;
  for (const LayerConfig& layer : model.config().layers) {
    if (layer.is_moe) fewest = std::min(fewest, layer.num_experts);
  }
  const CondenseOptions options{
      .method = flags.neurons ? CondenseMethod::kNeurons : CondenseMethod::kExperts,
      .max_experts = flags.max_experts >= 0 ? flags.max_experts : fewest,
      .most_neurons = flags.most_neurons >= 0 ? flags.most_neurons : kMostNeurons,
      .compute = session.compute(),
      .resume = session.flags.resume,
      .checkpoint_seconds = flags.checkpoint_seconds,
      .memory_budget_bytes = session.memory_budget()};
  if (flags.neurons && options.most_neurons > 0 &&
      WholeExperts(model, options.max_experts, options.most_neurons)) {
    session.Warn(
        fmt::format("{} experts' worth are too many to be chosen of {} neurons in a layer: whole "
                    "experts are chosen by least squares; --neurons takes more, 16 bytes of memory "
                    "times its square",
                    options.max_experts, options.most_neurons));
  }
  const CondensePlan plan =
      PlanCondense(model, search, alpha, options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "observe");
  if (flags.neurons) {
    session.Note(
        fmt::format("observe: {} tokens to choose up to {} experts' worth a layer "
                    "on; {} of memory",
                    FormatCount(static_cast<uint64_t>(plan.stats.search_tokens)),
                    options.max_experts, FormatBytes(plan.memory.total_bytes())));
  } else {
    session.Note(fmt::format(
        "observe: {} tokens to search {} experts a layer on, weights averaged over {}; {} of "
        "memory, "
        "{} of scratch on disk",
        FormatCount(static_cast<uint64_t>(plan.stats.search_tokens)), options.max_experts,
        FormatCount(static_cast<uint64_t>(plan.stats.alpha_tokens)),
        FormatBytes(plan.memory.total_bytes()), FormatBytes(plan.disk_bytes)));
  }
  if (session.flags.dry_run) {
    session.PrintDryRun("observe", {{"search_tokens", plan.stats.search_tokens},
                                    {"alpha_tokens", plan.stats.alpha_tokens},
                                    {"bytes_to_write", plan.disk_bytes}});
    return 0;
  }
  const double start = session.seconds();
  const CondenseStats stats =
      RunCondense(model, options, plan, output, session.pool(), session.control());
  const double seconds = session.seconds() - start;
  if (flags.neurons) return ReportNeurons(session, stats, output, seconds);
  std::string table = "  layer  divergence of the layer's output after each expert (experts)\n";
  OrderedJson layers = OrderedJson::array();
  int64_t never = 0;
  for (const CondenseLayer& layer : stats.layers) {
    std::string steps;
    OrderedJson experts = OrderedJson::array(), divergence = OrderedJson::array();
    for (const GreedyStep& step : layer.steps) {
      steps += fmt::format("  {:.3e} ({})", step.divergence, step.chosen);
      experts.push_back(step.chosen);
      divergence.push_back(step.divergence);
    }
    for (const int64_t count : layer.alpha_count) never += count == 0 ? 1 : 0;
    table += fmt::format("  {:>5}{}\n", layer.layer, steps);
    layers.push_back({{"layer", layer.layer}, {"experts", experts}, {"js", divergence}});
  }
  if (never > 0) {
    session.Warn(fmt::format("{} experts were never selected: their weight is taken as {}", never,
                             kUnselectedAlpha));
  }
  return Report(session, stats, layers, table, output, seconds);
}

CompressionPlan MakeCondensingPlan(Session& session, const fs::path& stats_folder,
                                   const CondenseChoice& choice, const std::string& target) {
  const CondenseStats stats = ReadCondenseStats(stats_folder);
  const Model model = Model::Open(choice.model);
  CheckCondenseStats(stats, model);
  CheckChoice(stats, choice, model);
  if (stats.method == "cd-moe") WarnWithoutShared(session, model);
  CompressionPlan plan;
  const bool neurons = stats.method == "condense";
  plan.method = stats.method;
  plan.objective = neurons ? "squared error relative to the stream" : "jensen-shannon";
  plan.model_type = stats.model_type;
  plan.model_fingerprint = stats.model_fingerprint;
  plan.target = target;
  plan.sources = stats.search_sources;
  plan.calibration_tokens = stats.search_tokens;
  plan.bytes_before = model.checkpoint().total_bytes();
  const std::string what = !neurons ? "greedy experts"
                           : WholeExperts(model, stats.max_experts, stats.most_neurons)
                               ? "whole experts by least squares"
                               : "neurons by least squares";
  std::vector<int32_t> chosen = choice.moe_layers;
  if (chosen.empty() && choice.layers > 0) {
    const TokenSet tokens = ReadSearchTokens(stats_folder, stats);
    const LayerSearchOptions options{
        .num_layers = choice.layers,
        .compute = stats.compute == "f32" ? ComputePrecision::kF32 : ComputePrecision::kAuto,
        .memory_budget_bytes = session.memory_budget(),
        .spill_folder = choice.spill_folder};
    const LayerSearchPlan search =
        PlanLayerSearch(model, tokens, options, session.pool().num_threads());
    session.RequireMemory(search.memory, "plan");
    const CondenseWeights condense = [&](int64_t moe_layer, const LayerWeights& intact) {
      const CondenseLayer& layer = stats.layers[static_cast<size_t>(moe_layer)];
      return CondensedWeightsOf(CondensedOf(stats, layer, choice.experts, model.config()),
                                layer.layer, intact, model);
    };
    if (choice.kl) {
      plan.search = fmt::format("{}, each layer alone by KL of the logits", what);
      const std::vector<double> kl = SingleLayerKl(model, tokens, condense, options, search,
                                                   session.pool(), session.control());
      std::vector<int32_t> order(kl.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return kl[static_cast<size_t>(a)] < kl[static_cast<size_t>(b)];
      });
      order.resize(static_cast<size_t>(choice.layers));
      plan.layer_order = order;
      plan.layer_kl = kl;
    } else {
      plan.search = fmt::format("{}, greedy layers", what);
      for (const GreedyStep& step : SearchLayersGreedily(model, tokens, condense, options, search,
                                                         session.pool(), session.control())) {
        plan.layer_order.push_back(step.chosen);
        plan.layer_divergence.push_back(step.divergence);
        plan.layer_candidates.push_back(step.candidates);
      }
    }
    session.FinishProgress();
    chosen = plan.layer_order;
  } else {
    plan.search = fmt::format("{}, layers named", what);
  }
  for (const CondenseLayer& layer : stats.layers) {
    LayerPlan entry;
    entry.layer = layer.layer;
    entry.moe_layer = layer.moe_layer;
    entry.num_experts = layer.num_experts;
    if (std::find(chosen.begin(), chosen.end(), layer.moe_layer) != chosen.end()) {
      entry.condensed = CondensedOf(stats, layer, choice.experts, model.config());
      entry.kept = entry.condensed->experts;
      std::sort(entry.kept.begin(), entry.kept.end());
    } else {
      entry.kept.resize(static_cast<size_t>(layer.num_experts));
      std::iota(entry.kept.begin(), entry.kept.end(), 0);
    }
    entry.dropped = OtherExperts(entry.kept, layer.num_experts);
    plan.layers.push_back(std::move(entry));
  }
  plan.bytes_after = PlanRewrite(model, plan, {}).bytes_after;
  return plan;
}

}  // namespace winnow::cli
