#include "pruning.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/error.h"
#include "base/units.h"
#include "kernels/throughput.h"
#include "observe/layer_stats.h"

namespace winnow::cli {

namespace {

// What observing reaches of the rate of one large product: attention, gathering, sums beside it.
constexpr double kUsualShareOfPeak = 0.8;

}  // namespace

ObservePlan PrepareObserve(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, ObserveOptions& options,
                           const std::string& output) {
  options.memory_budget_bytes = session.memory_budget();
  options.compute = session.compute();
  options.resume = session.flags.resume;
  const int threads = session.pool().num_threads();
  std::optional<ObservePlan> plan;
  if (options.level) {
    plan = PlanObserve(model, sources, options, threads);
  } else {
    // Full statistics where they fit, else what the selected experts show.
    try {
      plan = PlanObserve(model, sources, options, threads);
      RequireDiskSpace(output, plan->stats_bytes, "full statistics");
    } catch (const ResourceError& problem) {
      if (options.progressive_keep) throw;
      const std::string reason = problem.what();
      session.Warn(fmt::format("full statistics do not fit ({}); gathering --stats routed",
                               reason.substr(0, reason.find(':'))));
      options.level = StatsLevel::kRouted;
      plan = PlanObserve(model, sources, options, threads);
    }
  }
  session.RequireMemory(plan->memory, "observe");
  if (!SkippingOf(model, "", false).empty()) {
    session.Note(
        "config.json skips experts at run time (betas); observing runs all that are routed");
  }
  if (session.flags.quiet)
    return *plan;  // nobody reads the estimate, which takes a tenth of a second
  const double rate = MeasureMatMulGigaFlops(session.pool(), options.compute);
  session.Note(fmt::format(
      "observe: {} tokens in {} text(s), level {}; {:.3g} TFLOP, about {} at this machine's {:.0f} "
      "GFLOP/s, {} to read; {} of memory, {} of statistics",
      FormatCount(static_cast<uint64_t>(plan->info.num_tokens())), plan->info.sources.size(),
      StatsLevelName(plan->info.level), plan->tera_flop,
      FormatSeconds(plan->tera_flop * 1000 / (rate * kUsualShareOfPeak)), rate,
      FormatBytes(model.checkpoint().total_bytes()), FormatBytes(plan->memory.total_bytes()),
      FormatBytes(plan->stats_bytes)));
  return *plan;
}

bool HasFinishedStats(const Session& session, const fs::path& stats, const StatsInfo& expected) {
  if (!session.flags.resume || !fs::exists(stats / "stats.json")) return false;
  if (StatsInfoToJson(ReadStatsInfo(stats)) == StatsInfoToJson(expected)) return true;
  throw UsageError(fmt::format("{} was made with another model, text or flag", stats.string()),
                   "repeat the command as it was, or start again with --force");
}

OrderedJson DescribeObserve(const ObservePlan& plan) {
  return {{"level", StatsLevelName(plan.info.level)},
          {"tokens", plan.info.num_tokens()},
          {"tera_flop", plan.tera_flop},
          {"bytes_to_read", plan.info.model_bytes},
          {"bytes_to_write", plan.stats_bytes}};
}

OrderedJson ReportCoverage(Session& session, const fs::path& stats, const StatsInfo& info) {
  OrderedJson layers = OrderedJson::array();
  std::string unreached;
  int64_t least = -1, most = 0, least_layer = 0, least_expert = 0;
  for (const StatsLayer& layer : info.layers) {
    const std::vector<int64_t> tokens = LayerStatsReader(stats, info, layer).Coverage();
    std::vector<int32_t> never;
    for (size_t e = 0; e < tokens.size(); ++e) {
      if (tokens[e] == 0) never.push_back(static_cast<int32_t>(e));
    }
    if (!never.empty()) {
      unreached += fmt::format("{}layer {}: {}", unreached.empty() ? "" : "; ", layer.layer,
                               fmt::join(never, " "));
    }
    layers.push_back(
        {{"layer", layer.layer}, {"tokens_per_expert", tokens}, {"never_used", never}});
    const auto [low, high] = std::minmax_element(tokens.begin(), tokens.end());
    if (least < 0 || *low < least) {
      least = *low;
      least_layer = layer.layer;
      least_expert = low - tokens.begin();
    }
    most = std::max(most, *high);
    if (session.flags.verbose) {
      session.Note(fmt::format("coverage of layer {}, tokens an expert: {}", layer.layer,
                               fmt::join(tokens, " ")));
    }
  }
  session.Note(fmt::format("coverage: {} to {} tokens an expert, fewest for expert {} of layer {}",
                           FormatCount(static_cast<uint64_t>(std::max<int64_t>(least, 0))),
                           FormatCount(static_cast<uint64_t>(most)), least_expert, least_layer));
  if (!unreached.empty()) {
    session.Warn(
        fmt::format("no calibration token used these experts ({}); what a plan says of them "
                    "rests on their un-routed outputs alone",
                    unreached));
  }
  return layers;
}

SkipBetas SkippingOf(const Model& model, const std::string& plan_path, bool no_skip) {
  if (no_skip) return {};
  const int64_t num_layers = model.config().num_layers();
  if (!plan_path.empty()) {
    const CompressionPlan plan = ReadPlan(plan_path);
    SkipBetas betas = SkipBetasOf(plan, num_layers);
    // As apply writes it: thresholds of the model hold among the experts it has.
    const bool prunes =
        std::any_of(plan.layers.begin(), plan.layers.end(), [&](const LayerPlan& layer) {
          return static_cast<int64_t>(layer.kept.size()) <
                 model.config().layers.at(static_cast<size_t>(layer.layer)).num_experts;
        });
    if (!betas.empty() || prunes) return betas;
  }
  SkipBetas betas;
  for (const LayerConfig& layer : model.config().layers) betas.push_back(layer.skip_beta);
  const bool any = std::any_of(betas.begin(), betas.end(), [](double beta) { return beta > 0; });
  return any ? betas : SkipBetas{};
}

OrderedJson SkippingJson(const Model& model, const SkipCounts& counts) {
  int64_t tokens = 0, experts = 0, reduced = 0;
  double dropped = 0;
  OrderedJson shares = OrderedJson::array();
  for (const int32_t layer : model.config().MoeLayers()) {
    const auto at = static_cast<size_t>(layer);
    const auto of_layer = static_cast<double>(std::max<int64_t>(1, counts.tokens[at]));
    tokens += counts.tokens[at];
    experts += counts.experts[at];
    reduced += counts.reduced[at];
    dropped += counts.dropped_weight[at];
    shares.push_back(static_cast<double>(counts.reduced[at]) / of_layer);
  }
  const auto all = static_cast<double>(std::max<int64_t>(1, tokens));
  return {{"experts_per_token", static_cast<double>(experts) / all},
          {"skipped_share", static_cast<double>(reduced) / all},
          {"skipped_share_per_layer", shares},
          {"dropped_weight", dropped / all}};
}

std::string DescribeSkipping(const Model& model, const SkipCounts& counts) {
  const OrderedJson json = SkippingJson(model, counts);
  return fmt::format(
      "skipping: {:.3f} of {} experts a token, {:.1f} % of tokens and layers use fewer, {:.2f} % "
      "of "
      "the routing weight is dropped",
      json["experts_per_token"].get<double>(), model.config().num_experts_per_tok,
      100 * json["skipped_share"].get<double>(), 100 * json["dropped_weight"].get<double>());
}

std::vector<std::vector<int32_t>> WhatIf(Session& session, const Model& model,
                                         const std::string& plan_path) {
  if (plan_path.empty()) return {};
  const CompressionPlan plan = ReadPlan(plan_path);
  CheckPlan(plan, model);
  if (plan.condenses()) {
    throw UsageError(fmt::format("{} condenses layers: it must be applied to be run", plan_path),
                     "winnow apply MODEL --plan PLAN -o OUT");
  }
  session.Note(fmt::format("as if {} were applied (not healed)", plan_path));
  return KeptExperts(plan, model.config().num_layers());
}

}  // namespace winnow::cli
