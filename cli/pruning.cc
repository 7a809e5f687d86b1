#include "pruning.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/error.h"
#include "base/units.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "plan/loader_target.h"

namespace winnow::cli {

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
  session.Note(fmt::format(
      "observe: {} tokens in {} text(s), level {}; {:.3g} TFLOP, {} of memory, {} of statistics",
      FormatCount(static_cast<uint64_t>(plan->info.num_tokens())), plan->info.sources.size(),
      StatsLevelName(plan->info.level), plan->tera_flop, FormatBytes(plan->memory.total_bytes()),
      FormatBytes(plan->stats_bytes)));
  return *plan;
}

OrderedJson ReportCoverage(Session& session, const fs::path& stats, const StatsInfo& info) {
  OrderedJson layers = OrderedJson::array();
  std::string unreached;
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
    if (session.flags.verbose) {
      session.Note(fmt::format("coverage of layer {}: {} to {} tokens an expert", layer.layer,
                               FormatCount(static_cast<uint64_t>(*low)),
                               FormatCount(static_cast<uint64_t>(*high))));
    }
  }
  if (!unreached.empty()) {
    session.Warn(
        fmt::format("no calibration token used these experts ({}); what a plan says of them "
                    "rests on their un-routed outputs alone",
                    unreached));
  }
  return layers;
}

CompressionPlan MakeNaeePlan(Session& session, const fs::path& stats, const StatsInfo& info,
                             NaeeOptions options, const std::string& target) {
  CheckNaee(info, options);
  CompressionPlan plan;
  plan.method = "naee";
  const SubsetSearch search = ResolveSearch(options, info.layers.front());
  plan.search = search == SubsetSearch::kEnumerate ? "enumeration" : "elimination and exchanges";
  plan.objective = info.progressive_keep ? "progressive" : "unsquared";
  plan.model_type = info.model_type;
  plan.model_fingerprint = info.model_fingerprint;
  plan.target = target;
  for (const StatsSource& source : info.sources) plan.sources.push_back(source.name);
  plan.calibration_tokens = info.num_tokens();
  plan.bytes_before = info.model_bytes;
  plan.bytes_after = info.model_bytes;
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("records of a batch", NaeeBytes(info, options));
  session.RequireMemory(memory, "plan");
  options.memory_budget_bytes = session.memory_budget() - memory.total_bytes();
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const StatsLayer& layer = info.layers[i];
    const LayerStatsReader records(stats, info, layer);
    plan.layers.push_back(
        ChooseNaee(records, info, layer, options, session.pool(), session.control()));
    const auto gone = static_cast<uint64_t>(layer.num_experts - options.keep);
    plan.bytes_after -= std::min(plan.bytes_after, gone * layer.expert_bytes);
    session.control().Report(
        {.stage = "plan",
         .layer = static_cast<int64_t>(i),
         .num_layers = static_cast<int64_t>(info.layers.size()),
         .work_done = info.num_tokens() * static_cast<int64_t>(i + 1),
         .work_total = info.num_tokens() * static_cast<int64_t>(info.layers.size())});
  }
  CheckTarget(plan, target);
  return plan;
}

std::string DescribePlan(const CompressionPlan& plan) {
  std::string text = fmt::format(
      "{}, {} over {} tokens of {}; weights {} -> {}\n", plan.method, plan.search,
      FormatCount(static_cast<uint64_t>(plan.calibration_tokens)), fmt::join(plan.sources, ", "),
      FormatBytes(plan.bytes_before), FormatBytes(plan.bytes_after));
  text += "  layer  loss        margin  dropped experts\n";
  for (const LayerPlan& layer : plan.layers) {
    text += fmt::format("  {:>5}  {:<10.6g}  {:<6.3g}  {}\n", layer.layer, layer.loss.value_or(0),
                        layer.margin.value_or(0), fmt::join(layer.dropped, " "));
  }
  return text;
}

std::vector<std::vector<int32_t>> WhatIf(Session& session, const Model& model,
                                         const std::string& plan_path) {
  if (plan_path.empty()) return {};
  const CompressionPlan plan = ReadPlan(plan_path);
  CheckPlan(plan, model);
  session.Note(fmt::format("as if {} were applied (not healed)", plan_path));
  return KeptExperts(plan, model.config().num_layers());
}

}  // namespace winnow::cli
