#include "planning.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "base/error.h"
#include "base/units.h"
#include "evaluation.h"
#include "heal/heal_run.h"
#include "methods/layer_budget.h"
#include "methods/naee_search.h"
#include "methods/score_method.h"
#include "observe/layer_stats.h"
#include "observe/stats_collector.h"
#include "plan/loader_target.h"
#include "weights/layer_reader.h"

namespace winnow::cli {

std::vector<std::string> SourceNames(const StatsInfo& info) {
  std::vector<std::string> names;
  for (const StatsSource& source : info.sources) names.push_back(source.name);
  return names;
}

std::vector<std::string> Unique(const std::vector<std::string>& names) {
  std::vector<std::string> unique;
  for (const std::string& name : names) {
    if (std::find(unique.begin(), unique.end(), name) == unique.end()) unique.push_back(name);
  }
  return unique;
}

uint64_t RequirePlanMemory(Session& session, const StatsInfo& info, const NaeeOptions& options) {
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("records of a batch", NaeeBytes(info, options));
  session.RequireMemory(memory, "plan");
  return session.memory_budget() - memory.total_bytes();
}

LayerPlan ChooseByScore(const std::vector<double>& scores, const ScoreInput& input,
                        const NaeeOptions& options) {
  LayerPlan plan;
  plan.layer = input.layer.layer;
  plan.num_experts = input.layer.num_experts;
  plan.kept = HighestScores(scores, options.keep, GuardedIn(options.guarded, input.layer));
  plan.dropped = OtherExperts(plan.kept, plan.num_experts);
  if (input.info.level == StatsLevel::kFull) {
    plan.loss = NaeeLoss(input.records, input.info, input.layer, plan.kept,
                         NaeeObjective::kUnsquared, input.pool, input.control);
  }
  return plan;
}

void ReportPlanned(const Session& session, const StatsInfo& info, size_t layer) {
  const auto num_layers = static_cast<int64_t>(info.layers.size());
  session.control().Report({.stage = "plan",
                            .layer = static_cast<int64_t>(layer),
                            .num_layers = num_layers,
                            .work_done = info.num_tokens() * static_cast<int64_t>(layer + 1),
                            .work_total = info.num_tokens() * num_layers});
}

GuardedExperts GuardFor(const StatsInfo& info, const PruningChoice& choice) {
  const NaeeObjective objective = choice.uneven ? NaeeObjective::kStream : choice.naee.objective;
  const bool counts_in_full = choice.method == "naee" && (objective == NaeeObjective::kUnsquared ||
                                                          objective == NaeeObjective::kSquared);
  if (counts_in_full || info.progressive_keep) return {};
  return Guarded(choice.super_experts);
}

namespace {

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
    curves.push_back(NaeeCurve(records, info, layer,
                               {NaeeObjective::kStream, choice.naee.memory_budget_bytes,
                                GuardedIn(choice.naee.guarded, layer)},
                               floor, session.pool(), session.control()));
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
      plan.loss = set.weight > 0 ? set.loss / set.weight : 0.0;
    }
    plan.dropped = OtherExperts(plan.kept, plan.num_experts);
    plans.push_back(plan);
  }
  return plans;
}

// What the plan loses of the routed outputs, in all and on each text. A layer's survivors are still
// numbered as the statistics are.
class OutputLosses {
 public:
  void Add(const std::vector<OutputLoss>& of_layer) {
    losses_.resize(of_layer.size());
    for (size_t s = 0; s < of_layer.size(); ++s) {
      losses_[s].sum += of_layer[s].sum;
      losses_[s].weight += of_layer[s].weight;
    }
  }
  void Finish(const StatsInfo& info, CompressionPlan& plan) const {
    if (losses_.empty()) return;
    std::map<std::string, OutputLoss> by_name;
    double sum = 0, weight = 0;
    for (size_t s = 0; s < losses_.size(); ++s) {
      OutputLoss& loss = by_name[info.sources[s].name];
      loss.sum += losses_[s].sum;
      loss.weight += losses_[s].weight;
      sum += info.sources[s].mix * losses_[s].sum;
      weight += info.sources[s].mix * losses_[s].weight;
    }
    plan.output_loss = weight > 0 ? sum / weight : 0.0;
    for (const std::string& name : Unique(plan.sources)) {
      const OutputLoss& loss = by_name[name];
      plan.output_loss_by_source.emplace_back(name, loss.weight > 0 ? loss.sum / loss.weight : 0.0);
    }
  }

 private:
  std::vector<OutputLoss> losses_;
};

// Half of the experts is where models part: those with many alike lose little, others nearly all.
void WarnOfRedundancy(Session& session, const StatsInfo& info, const CompressionPlan& plan) {
  int64_t before = 0, after = 0;
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    before += info.layers[i].num_experts;
    after += std::ssize(plan.layers[i].kept);
  }
  if (2 * after > before) return;
  session.Warn(fmt::format(
      "{:.0f} % of the experts go{}: published results at half range from 99.8 % of a model's "
      "score "
      "(GSM8K, 128 experts a layer) to 19.5 % (64); how alike the experts are decides. Measure the "
      "result with eval before you rely on it, or remove a quarter",
      100.0 * static_cast<double>(before - after) / static_cast<double>(before),
      plan.output_loss
          ? fmt::format(", with {:.0f} % of the routed output", 100 * *plan.output_loss)
          : ""));
}

int32_t OriginalNumber(const StatsInfo& info, const SuperExpert& super) {
  for (const StatsLayer& layer : info.layers) {
    if (layer.layer == super.layer && !layer.as_if_kept.empty()) {
      return layer.as_if_kept[static_cast<size_t>(super.expert)];
    }
  }
  return super.expert;
}

// Those that a plan drops all the same.
void WarnOfSuperExperts(Session& session, const StatsInfo& info, const PruningChoice& choice,
                        const CompressionPlan& plan) {
  for (const SuperExpert& super : choice.super_experts) {
    const int32_t number = OriginalNumber(info, super);
    for (const LayerPlan& layer : plan.layers) {
      if (layer.layer != super.layer ||
          !std::binary_search(layer.dropped.begin(), layer.dropped.end(), number)) {
        continue;
      }
      session.Warn(
          fmt::format("the plan drops expert {} of layer {}, whose activations are {:.0f} times "
                      "its layer's median",
                      number, super.layer, super.times_median));
    }
  }
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
  plan.sources = SourceNames(info);
  plan.calibration_tokens = info.num_tokens();
  if (std::any_of(info.sources.begin(), info.sources.end(),
                  [](const StatsSource& source) { return source.mix != 1; })) {
    for (const std::string& name : Unique(plan.sources)) {
      for (const StatsSource& source : info.sources) {
        if (source.name != name) continue;
        plan.mix.emplace_back(name, source.mix);
        break;
      }
    }
  }
  plan.bytes_before = info.model_bytes;
  plan.bytes_after = info.model_bytes;
  return plan;
}

}  // namespace

namespace {

// Beyond these a text outweighs or vanishes anyway.
constexpr double kLeastFactor = 1e-6, kMostFactor = 1e6;

}  // namespace

StatsInfo ReadWeighedStats(Session& session, const fs::path& stats, const std::string& mix,
                           bool all_tokens) {
  StatsInfo info = ReadStatsInfo(stats);
  if (info.token_weights && all_tokens) {
    if (info.progressive_keep) {
      throw UsageError("--all-tokens: progressive statistics chose by the mask of the data",
                       "observe the ids without their mask");
    }
    info.token_weights = false;
  } else if (info.token_weights) {
    session.Note("tokens count as the mask of the data says; --all-tokens counts them alike");
  } else if (all_tokens) {
    throw UsageError("--all-tokens: the data of these statistics has no mask",
                     "leave it out: all tokens count already");
  }
  if (mix.empty()) return info;
  const std::string expected = fmt::format("names: {}", fmt::join(Unique(SourceNames(info)), ", "));
  std::set<std::string> seen;
  for (size_t begin = 0; begin <= mix.size();) {
    const size_t end = std::min(mix.find(',', begin), mix.size());
    const std::string item = mix.substr(begin, end - begin);
    begin = end + 1;
    const size_t equals = item.rfind('=');
    const std::string name = item.substr(0, equals);
    double factor = -1;
    size_t used = 0;
    try {
      if (equals != std::string::npos) factor = std::stod(item.substr(equals + 1), &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (equals == std::string::npos || used == 0 || equals + 1 + used != item.size() ||
        !(factor == 0 || (factor >= kLeastFactor && factor <= kMostFactor))) {
      throw UsageError(
          fmt::format("--mix: \"{}\" is not NAME=FACTOR", item),
          fmt::format("e.g. --mix prose=1,code=3, factors 0 or 1e-6 to 1e6; {}", expected));
    }
    if (!seen.insert(name).second) {
      throw UsageError(fmt::format("--mix: \"{}\" is there twice", name), expected);
    }
    bool found = false;
    for (StatsSource& source : info.sources) {
      if (source.name != name) continue;
      source.mix = factor;
      found = true;
    }
    if (!found) {
      throw UsageError(fmt::format("--mix: no text of the statistics is called \"{}\"", name),
                       expected);
    }
  }
  if (std::all_of(info.sources.begin(), info.sources.end(),
                  [](const StatsSource& source) { return source.mix == 0; })) {
    throw UsageError("--mix leaves nothing", "give at least one text a factor above 0");
  }
  if (info.progressive_keep) {
    throw UsageError("--mix: progressive statistics chose with their own mix",
                     "observe with other shares: --calib FILE:SHARE");
  }
  return info;
}

std::vector<SuperExpert> NameSuperExperts(Session& session, const fs::path& stats,
                                          const StatsInfo& info) {
  const std::vector<SuperExpert> found = FindSuperExperts(stats, info);
  for (const SuperExpert& super : found) {
    session.Note(
        fmt::format("layer {}, expert {}: outputs up to {:.4g}, {:.0f} times its layer's median",
                    super.layer, OriginalNumber(info, super), super.largest, super.times_median));
  }
  return found;
}

CompressionPlan MakeSkippingPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                 const std::optional<SkipBudget>& budget,
                                 const std::string& target) {
  CheckNaeeSkip(info, budget);
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("ratios and errors of every token", NaeeSkipBytes(info));
  session.RequireMemory(memory, "plan");
  CompressionPlan plan = StartPlan(info, "naee-skip", target);
  plan.search = !budget            ? "median"
                : budget->quantile ? "one quantile in every layer"
                                   : "equal marginal error";
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

CompressionPlan MakePruningPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                                PruningChoice choice, const std::string& target) {
  NaeeOptions& options = choice.naee;
  const ScoreMethod* score = nullptr;
  CompressionPlan plan = StartPlan(info, choice.method, target);
  options.guarded = GuardFor(info, choice);
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
    CheckGuarded(options);
    plan.search = "score";
    plan.objective = score->formula;
  }
  options.memory_budget_bytes = RequirePlanMemory(session, info, options);
  OutputLosses output_losses;
  const auto add_loss = [&](const LayerStatsReader& records, const StatsLayer& layer,
                            const std::vector<int32_t>& kept) {
    if (info.level != StatsLevel::kFull) return;
    output_losses.Add(LossOfOutput(records, info, layer, kept, session.pool(), session.control()));
  };
  if (choice.uneven) {
    plan.layers = DivideAmongLayers(session, stats, info, choice);
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const StatsLayer& layer = info.layers[i];
      add_loss(LayerStatsReader(stats, info, layer), layer, plan.layers[i].kept);
      FinishLayer(layer, plan.layers[i], plan);
    }
    output_losses.Finish(info, plan);
    WarnOfSuperExperts(session, info, choice, plan);
    WarnOfRedundancy(session, info, plan);
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
      plan.layers.push_back(ChooseByScore(score->score(input), input, options));
    }
    add_loss(records, layer, plan.layers.back().kept);
    FinishLayer(layer, plan.layers.back(), plan);
    ReportPlanned(session, info, i);
  }
  output_losses.Finish(info, plan);
  WarnOfSuperExperts(session, info, choice, plan);
  WarnOfRedundancy(session, info, plan);
  CheckTarget(plan, target);
  return plan;
}

CompressionPlan MakeWeightsPlan(Session& session, const Model& model, int64_t keep,
                                const std::string& target) {
  const StatsInfo info = DescribeModel(model);
  CheckScoreMethod(kAimer, info, keep);
  CompressionPlan plan = StartPlan(info, kAimer.name, target);
  plan.search = "score";
  plan.objective = kAimer.formula;
  const LayerReaderOptions reading;
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("weights of two layers", 2 * LayerReader::LargestLayerBytes(model, reading));
  session.RequireMemory(memory, "plan");
  LayerReader reader(model, reading);
  size_t next = 0;
  for (int64_t i = 0; i < model.config().num_layers(); ++i) {
    session.control().Poll();
    const LayerWeights& weights = reader.Get(i);
    if (!model.config().layers[static_cast<size_t>(i)].is_moe) continue;
    const StatsLayer& layer = info.layers[next];
    std::vector<double> scores = WeightFlatness(weights, session.pool());
    for (double& score : scores) score = -score;
    LayerPlan chosen;
    chosen.layer = layer.layer;
    chosen.num_experts = layer.num_experts;
    chosen.kept = HighestScores(scores, keep);
    chosen.dropped = OtherExperts(chosen.kept, layer.num_experts);
    FinishLayer(layer, chosen, plan);
    plan.layers.push_back(std::move(chosen));
    ReportPlanned(session, info, next++);
  }
  WarnOfRedundancy(session, info, plan);
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

}  // namespace winnow::cli
