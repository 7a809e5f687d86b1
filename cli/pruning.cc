#include "pruning.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/units.h"
#include "evaluation.h"
#include "heal/heal_run.h"
#include "kernels/throughput.h"
#include "methods/layer_budget.h"
#include "methods/naee.h"
#include "methods/naee_search.h"
#include "methods/score_method.h"
#include "observe/layer_stats.h"
#include "plan/loader_target.h"

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

namespace {

// Budget for records held while planning; refuses what does not fit.
uint64_t RequirePlanMemory(Session& session, const StatsInfo& info, const NaeeOptions& options) {
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("records of a batch", NaeeBytes(info, options));
  session.RequireMemory(memory, "plan");
  return session.memory_budget() - memory.total_bytes();
}

LayerPlan ChooseByScore(const std::vector<double>& scores, const ScoreInput& input, int64_t keep) {
  LayerPlan plan;
  plan.layer = input.layer.layer;
  plan.num_experts = input.layer.num_experts;
  plan.kept = HighestScores(scores, keep);
  plan.dropped = OtherExperts(plan.kept, plan.num_experts);
  if (input.info.level == StatsLevel::kFull) {
    plan.loss =
        NaeeLoss(input.records, input.info, input.layer, plan.kept, input.pool, input.control);
  }
  return plan;
}

// Spearman's rank correlation of two scores; ties share their mean rank.
double RankCorrelation(const std::vector<double>& a, const std::vector<double>& b) {
  const auto ranks = [](const std::vector<double>& values) {
    std::vector<double> rank(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      for (const double other : values) {
        rank[i] += other < values[i] ? 1.0 : other == values[i] ? 0.5 : 0.0;
      }
    }
    return rank;
  };
  const std::vector<double> x = ranks(a), y = ranks(b);
  const double mean = static_cast<double>(x.size()) / 2;
  double xy = 0, xx = 0, yy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    xy += (x[i] - mean) * (y[i] - mean);
    xx += (x[i] - mean) * (x[i] - mean);
    yy += (y[i] - mean) * (y[i] - mean);
  }
  return xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : 0.0;
}

// `layer` counts the statistics' layers: how far planning is.
void ReportPlanned(const Session& session, const StatsInfo& info, size_t layer) {
  const auto num_layers = static_cast<int64_t>(info.layers.size());
  session.control().Report({.stage = "plan",
                            .layer = static_cast<int64_t>(layer),
                            .num_layers = num_layers,
                            .work_done = info.num_tokens() * static_cast<int64_t>(layer + 1),
                            .work_total = info.num_tokens() * num_layers});
}

// Numbers of the original model, and what is saved.
void FinishLayer(const StatsLayer& layer, LayerPlan& chosen, CompressionPlan& plan) {
  if (!layer.as_if_kept.empty()) {
    ComposeWithSurvivors(layer.as_if_kept, layer.model_num_experts, chosen);
  }
  plan.bytes_after -= std::min(plan.bytes_after, chosen.dropped.size() * layer.expert_bytes);
}

std::vector<LayerPlan> DivideAmongLayers(Session& session, const fs::path& stats,
                                         const StatsInfo& info, const PruningChoice& choice) {
  const int64_t k = info.num_experts_per_tok;
  if (info.progressive_keep) {
    throw UsageError("progressive statistics chose the same number of survivors in every layer",
                     "an uneven budget needs statistics gathered without --progressive");
  }
  const int64_t floor = choice.floor > 0 ? choice.floor : k;
  if (floor < k || floor > choice.naee.keep) {
    throw UsageError(
        fmt::format("--floor {}: each token uses {} experts, and {} are kept on average", floor, k,
                    choice.naee.keep),
        "give a number from the first to the second, or leave it out");
  }
  std::vector<std::vector<NaeeSet>> curves;
  std::vector<std::vector<double>> costs;
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const StatsLayer& layer = info.layers[i];
    const LayerStatsReader records(stats, info, layer);
    curves.push_back(NaeeCurve(records, info, layer, NaeeObjective::kStream, floor,
                               choice.naee.memory_budget_bytes, session.pool(), session.control()));
    std::vector<double> cost(static_cast<size_t>(layer.num_experts) + 1,
                             std::numeric_limits<double>::infinity());
    cost.back() = 0;
    for (const NaeeSet& set : curves.back()) cost[set.kept.size()] = set.loss;
    costs.push_back(cost);
    ReportPlanned(session, info, i);
  }
  const std::vector<int64_t> survivors =
      DivideSurvivors(costs, choice.naee.keep * std::ssize(costs));
  std::vector<LayerPlan> plans;
  for (size_t i = 0; i < info.layers.size(); ++i) {
    LayerPlan plan;
    plan.layer = info.layers[i].layer;
    plan.num_experts = info.layers[i].num_experts;
    plan.loss = 0;
    if (survivors[i] == plan.num_experts) {
      plan.kept = OtherExperts({}, plan.num_experts);
    } else {
      const NaeeSet& set = curves[i].at(static_cast<size_t>(plan.num_experts - 1 - survivors[i]));
      plan.kept = set.kept;
      plan.loss = set.loss / static_cast<double>(info.num_tokens());
    }
    plan.dropped = OtherExperts(plan.kept, plan.num_experts);
    plans.push_back(plan);
  }
  return plans;
}

// What a plan says of where it comes from.
CompressionPlan StartPlan(const StatsInfo& info, const std::string& method,
                          const std::string& target) {
  CheckTargetName(target);
  CompressionPlan plan;
  plan.method = method;
  plan.model_type = info.model_type;
  plan.model_fingerprint = info.model_fingerprint;
  plan.target = target;
  for (const StatsSource& source : info.sources) plan.sources.push_back(source.name);
  plan.calibration_tokens = info.num_tokens();
  plan.bytes_before = info.model_bytes;
  plan.bytes_after = info.model_bytes;
  return plan;
}

}  // namespace

CompressionPlan MakeSkippingPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                 const std::optional<SkipBudget>& budget,
                                 const std::string& target) {
  CheckNaeeSkip(info, budget);
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("ratios and errors of every token", NaeeSkipBytes(info));
  session.RequireMemory(memory, "plan");
  CompressionPlan plan = StartPlan(info, "naee-skip", target);
  plan.search = budget ? "equal marginal error" : "median";
  plan.objective = budget ? "squared error relative to the residual stream" : "none";
  plan.layers = ChooseNaeeSkip(stats, info, budget, session.pool(), session.control());
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const StatsLayer& layer = info.layers[i];
    if (layer.as_if_kept.empty()) continue;
    ComposeWithSurvivors(layer.as_if_kept, layer.model_num_experts, plan.layers[i]);
    plan.bytes_after -=
        std::min(plan.bytes_after, plan.layers[i].dropped.size() * layer.expert_bytes);
  }
  CheckTarget(plan, target);
  return plan;
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

CompressionPlan MakePruningPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                PruningChoice choice, const std::string& target) {
  NaeeOptions& options = choice.naee;
  const ScoreMethod* score = nullptr;
  CompressionPlan plan = StartPlan(info, choice.method, target);
  if (choice.method == "naee") {
    CheckNaee(info, options);
    const SubsetSearch search = ResolveSearch(options, info.layers.front());
    plan.search = search == SubsetSearch::kEnumerate ? "enumeration" : "elimination+swaps";
    plan.objective = NaeeObjectiveName(options.objective);
    if (info.progressive_keep) plan.objective = "progressive " + plan.objective;
    if (choice.uneven) {
      options.search = SubsetSearch::kEliminate;  // what memory is planned for
      plan.search = "elimination+swaps, survivors divided among layers";
      plan.objective = NaeeObjectiveName(NaeeObjective::kStream);
    }
  } else {
    score = FindScoreMethod(choice.method);
    if (score == nullptr) {
      std::vector<std::string> known = {"naee"};
      for (const ScoreMethod* method : ScoreMethods()) known.emplace_back(method->name);
      const std::string near = Suggest(choice.method, known);
      throw UsageError(fmt::format("--method: \"{}\" is not known", choice.method),
                       near.empty() ? fmt::format("one of {}", fmt::join(known, ", "))
                                    : fmt::format("did you mean {}?", near));
    }
    CheckScoreMethod(*score, info, options.keep);
    plan.search = "score";
    plan.objective = score->formula;
  }
  options.memory_budget_bytes = RequirePlanMemory(session, info, options);
  if (choice.uneven) {
    plan.layers = DivideAmongLayers(session, stats, info, choice);
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      FinishLayer(info.layers[i], plan.layers[i], plan);
    }
    CheckTarget(plan, target);
    return plan;
  }
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const StatsLayer& layer = info.layers[i];
    const LayerStatsReader records(stats, info, layer);
    if (score == nullptr) {
      plan.layers.push_back(
          ChooseNaee(records, info, layer, options, session.pool(), session.control()));
    } else {
      const ExpertSummary summary = SummarizeExperts(records, info, layer);
      const ScoreInput input{
          records,          info, layer, summary, options.memory_budget_bytes, session.pool(),
          session.control()};
      plan.layers.push_back(ChooseByScore(score->score(input), input, options.keep));
    }
    FinishLayer(layer, plan.layers.back(), plan);
    ReportPlanned(session, info, i);
  }
  CheckTarget(plan, target);
  return plan;
}

CompressionPlan BetterPlan(Session& session, const Model& model,
                           const std::vector<SourceBlocks>& sources, const CompressionPlan& uneven,
                           const CompressionPlan& uniform, const std::string& spill_folder) {
  const std::vector<EvalText> judge = {{"calibration", JudgingSequences(sources)}};
  const auto measure = [&](const CompressionPlan& plan) {
    return Evaluate(session, model, judge,
                    {.kept_experts = KeptExperts(plan, model.config().num_layers())}, spill_folder)
        .texts.front();
  };
  const PerplexityResult a = measure(uniform), b = measure(uneven);
  const PairedDifference difference = Compare(a, b);
  session.Note(fmt::format(
      "nll on {} judging tokens: uniform {:.4f}, uneven {:.4f} ({:+.4f} +- {}); {} is taken",
      FormatCount(static_cast<uint64_t>(a.tokens)), a.nll, b.nll, difference.nll,
      FormatStandardError(difference.standard_error), difference.nll < 0 ? "uneven" : "uniform"));
  return difference.nll < 0 ? uneven : uniform;
}

void ComparePruning(Session& session, const fs::path& stats, const StatsInfo& info,
                    const NaeeOptions& options) {
  const bool full = info.level == StatsLevel::kFull;
  NaeeOptions naee = options;
  naee.memory_budget_bytes = RequirePlanMemory(session, info, options);
  if (full) CheckNaee(info, options);
  std::vector<const ScoreMethod*> usable;
  for (const ScoreMethod* method : ScoreMethods()) {
    if (static_cast<int>(info.level) < static_cast<int>(method->needs)) continue;
    CheckScoreMethod(*method, info, options.keep);
    usable.push_back(method);
  }
  OrderedJson layers = OrderedJson::array();
  std::string text = fmt::format("keeping {} experts a layer; loss is NAEE's\n", options.keep);
  text += "  layer  method          loss        correlation  dropped experts\n";
  for (const StatsLayer& layer : info.layers) {
    const LayerStatsReader records(stats, info, layer);
    const ExpertSummary summary = SummarizeExperts(records, info, layer);
    const ScoreInput input{
        records, info, layer, summary, naee.memory_budget_bytes, session.pool(), session.control()};
    // Scores are compared with what each expert's removal alone would cost, where that is known.
    std::vector<double> reference;
    if (full) reference = kLeaveOneOut.score(input);
    OrderedJson methods = OrderedJson::array();
    const auto add = [&](const std::string& name, LayerPlan plan,
                         std::optional<double> correlation) {
      if (!layer.as_if_kept.empty()) {
        ComposeWithSurvivors(layer.as_if_kept, layer.model_num_experts, plan);
      }
      OrderedJson row = {{"method", name}, {"dropped", plan.dropped}, {"kept", plan.kept}};
      if (plan.loss) row["loss"] = *plan.loss;
      if (correlation) row["rank_correlation"] = *correlation;
      methods.push_back(row);
      text += fmt::format("  {:>5}  {:<14}  {:<10}  {:<11}  {}\n", layer.layer, name,
                          plan.loss ? fmt::format("{:.6g}", *plan.loss) : "-",
                          correlation ? fmt::format("{:.3f}", *correlation) : "-",
                          fmt::join(plan.dropped, " "));
    };
    if (full) {
      add("naee", ChooseNaee(records, info, layer, naee, session.pool(), session.control()), {});
    }
    for (const ScoreMethod* method : usable) {
      const std::vector<double> scores = method == &kLeaveOneOut ? reference : method->score(input);
      add(method->name, ChooseByScore(scores, input, options.keep),
          full ? std::optional(RankCorrelation(scores, reference)) : std::nullopt);
    }
    layers.push_back({{"layer", layer.layer}, {"methods", methods}});
  }
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.compare/1"}, {"keep", options.keep}, {"layers", layers}});
  } else {
    session.Print(text);
  }
}

std::string DescribePlan(const CompressionPlan& plan) {
  std::string text = fmt::format(
      "{}, {} over {} tokens of {}; weights {} -> {}\n", plan.method, plan.search,
      FormatCount(static_cast<uint64_t>(plan.calibration_tokens)), fmt::join(plan.sources, ", "),
      FormatBytes(plan.bytes_before), FormatBytes(plan.bytes_after));
  const bool skips = !plan.layers.empty() && plan.layers.front().beta.has_value();
  text += fmt::format("  layer  loss        margin  {}dropped experts\n", skips ? "beta    " : "");
  for (const LayerPlan& layer : plan.layers) {
    text += fmt::format(
        "  {:>5}  {:<10}  {:<6}  {}{}\n", layer.layer,
        layer.loss ? fmt::format("{:.6g}", *layer.loss) : "-",
        layer.margin ? fmt::format("{:.3g}", *layer.margin) : "-",
        skips ? fmt::format("{:<6.4f}  ", layer.beta.value_or(0)) : "",
        layer.dropped.empty() ? "none" : fmt::format("{}", fmt::join(layer.dropped, " ")));
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
