// Tables of planning for people and as JSON: a plan, every number of survivors, every method.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "base/error.h"
#include "base/units.h"
#include "methods/naee_search.h"
#include "observe/layer_stats.h"
#include "planning.h"

namespace winnow::cli {
namespace {

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

}  // namespace

void PrintCurve(Session& session, const fs::path& stats, const StatsInfo& info,
                PruningChoice choice) {
  NaeeOptions& options = choice.naee;
  int64_t most = 0;
  for (const StatsLayer& layer : info.layers) most = std::max(most, layer.num_experts);
  const int64_t least = info.num_experts_per_tok;
  if (info.level != StatsLevel::kFull || info.progressive_keep) {
    throw UsageError(info.progressive_keep
                         ? "--curve: progressive statistics hold for one number of survivors"
                         : "--curve needs the outputs of all experts",
                     "observe with --stats full and without --progressive");
  }
  options.keep = least;
  options.search = SubsetSearch::kEliminate;
  options.guarded = GuardFor(info, choice);
  options.memory_budget_bytes = RequirePlanMemory(session, info, options);
  struct Row {
    double loss = 0, share = 0, worst_share = 0;
    int32_t worst_layer = 0;
    uint64_t bytes_removed = 0;
    OrderedJson layers = OrderedJson::array();
  };
  std::map<int64_t, Row, std::greater<>> rows;
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const StatsLayer& layer = info.layers[i];
    const LayerStatsReader records(stats, info, layer);
    const std::vector<NaeeSet> curve = NaeeCurve(
        records, info, layer,
        {options.objective, options.memory_budget_bytes, GuardedIn(options.guarded, layer)}, least,
        session.pool(), session.control());
    // A layer that has no more than so many loses nothing.
    for (int64_t keep = layer.num_experts; keep < most; ++keep) {
      rows[keep].layers.push_back({{"layer", layer.layer}, {"loss", 0.0}, {"share", 0.0}});
    }
    for (const NaeeSet& set : curve) {
      const auto kept = std::ssize(set.kept);
      Row& row = rows[kept];
      const double share = set.whole > 0 ? set.loss / set.whole : 0.0;
      row.loss += set.loss;
      row.share += share / static_cast<double>(info.layers.size());
      if (share >= row.worst_share) {
        row.worst_share = share;
        row.worst_layer = layer.layer;
      }
      row.bytes_removed += static_cast<uint64_t>(layer.num_experts - kept) * layer.expert_bytes;
      LayerPlan plan;
      plan.kept = set.kept;
      plan.num_experts = layer.num_experts;
      plan.dropped = OtherExperts(set.kept, layer.num_experts);
      if (!layer.as_if_kept.empty()) {
        ComposeWithSurvivors(layer.as_if_kept, layer.model_num_experts, plan);
      }
      row.layers.push_back(
          {{"layer", layer.layer}, {"loss", set.loss}, {"share", share}, {"kept", plan.kept}});
    }
    ReportPlanned(session, info, i);
  }
  // Guarded experts may end a layer's curve early.
  std::erase_if(rows,
                [&](const auto& row) { return row.second.layers.size() < info.layers.size(); });
  const std::string objective(NaeeObjectiveName(options.objective));
  const bool swaps = most <= kMostPolished;
  OrderedJson json = OrderedJson::array();
  std::string text = fmt::format(
      "NAEE's loss for every number of survivors: {}, elimination{}, {} tokens of {}\n"
      "share: of the loss if the layers' routed experts put out nothing\n"
      "  keep  removed  weights     loss        share    worst layer\n",
      objective, swaps ? "+swaps" : " (plan --keep R adds swaps)",
      FormatCount(static_cast<uint64_t>(info.num_tokens())),
      fmt::join(Unique(SourceNames(info)), ", "));
  for (const auto& [kept, row] : rows) {
    const double removed = 1.0 - static_cast<double>(kept) / static_cast<double>(most);
    const uint64_t bytes = info.model_bytes - std::min(info.model_bytes, row.bytes_removed);
    text += fmt::format("  {:>4}  {:>5.1f} %  {:<10}  {:<10.6g}  {:>5.1f} %  {:>5} ({:.1f} %)\n",
                        kept, 100 * removed, FormatBytes(bytes), row.loss, 100 * row.share,
                        row.worst_layer, 100 * row.worst_share);
    json.push_back({{"keep", kept},
                    {"removed", removed},
                    {"bytes_after", bytes},
                    {"loss", row.loss},
                    {"share", row.share},
                    {"layers", row.layers}});
  }
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.curve/1"},
                       {"objective", objective},
                       {"search", swaps ? "elimination+swaps" : "elimination"},
                       {"rows", json}});
  } else {
    session.Print(text);
  }
}

void ComparePruning(Session& session, const fs::path& stats, const StatsInfo& info,
                    const PruningChoice& choice) {
  const bool full = info.level == StatsLevel::kFull;
  NaeeOptions options = choice.naee, naee = choice.naee;
  naee.guarded = GuardFor(info, choice);
  options.guarded = Guarded(choice.super_experts);  // of the scores
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
      add(method->name, ChooseByScore(scores, input, options),
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

namespace {

// "experts 3 7 1", or of how many experts how many neurons.
std::string KeptParts(const CondensePlanOfLayer& condensed) {
  size_t neurons = 0;
  for (const std::vector<int32_t>& rows : condensed.neurons) neurons += rows.size();
  return neurons > 0 ? fmt::format("{} neurons of {} experts", neurons, condensed.experts.size())
                     : fmt::format("experts {}", fmt::join(condensed.experts, " "));
}

}  // namespace

std::string DescribePlan(const CompressionPlan& plan) {
  std::string text =
      fmt::format("{}, {} over {} tokens of {}; weights {} -> {}\n", plan.method, plan.search,
                  FormatCount(static_cast<uint64_t>(plan.calibration_tokens)),
                  fmt::join(Unique(plan.sources), ", "), FormatBytes(plan.bytes_before),
                  FormatBytes(plan.bytes_after));
  if (!plan.mix.empty()) {
    text += "mix:";
    for (const auto& [name, factor] : plan.mix) text += fmt::format(" {} x {:g}", name, factor);
    text += "\n";
  }
  if (!plan.layer_order.empty()) {
    text += fmt::format("layers in the order chosen (among the MoE layers): {}\n",
                        fmt::join(plan.layer_order, " "));
  }
  const bool skips = !plan.layers.empty() && plan.layers.front().beta.has_value();
  text += fmt::format("  layer  loss        margin  {}dropped experts\n", skips ? "beta    " : "");
  for (const LayerPlan& layer : plan.layers) {
    if (layer.condensed) {
      text += fmt::format("  {:>5}  condensed to {}\n", layer.layer,
                          layer.kept.empty() ? "the shared expert" : KeptParts(*layer.condensed));
      continue;
    }
    text += fmt::format(
        "  {:>5}  {:<10}  {:<6}  {}{}\n", layer.layer,
        layer.loss ? fmt::format("{:.6g}", *layer.loss) : "-",
        layer.margin ? fmt::format("{:.3g}", *layer.margin) : "-",
        skips ? fmt::format("{:<6.4f}  ", layer.beta.value_or(0)) : "",
        layer.dropped.empty() ? "none" : fmt::format("{}", fmt::join(layer.dropped, " ")));
  }
  if (plan.output_loss) {
    text += fmt::format("  lost of the routed output: {:.1f} %", 100 * *plan.output_loss);
    for (const auto& [name, loss] : plan.output_loss_by_source) {
      if (plan.output_loss_by_source.size() > 1)
        text += fmt::format("; {} {:.1f} %", name, 100 * loss);
    }
    text += "\n";
  }
  return text;
}

}  // namespace winnow::cli
