// winnow plan: from statistics to a decision per layer.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "condensing.h"
#include "mixing.h"
#include "plan/loader_target.h"
#include "planning.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct PlanFlags {
  std::string stats, output, method = "naee", search = "auto", target = "transformers",
                             objective = "unsquared", budget = "uniform", mix;
  int64_t keep = 0, floor = 0;
  double ratio = 0, active = 0, max_error = 0, quantile = 0;
  CondenseChoice condense;
  MixChoice mixed;
  CalibrationFlags calibration;
  std::string layer_order, moe_layers;
  int64_t width = -1;
  bool compare = false, curve = false, no_guard = false, all_tokens = false;
};

SubsetSearch ParseSearch(const std::string& name) {
  if (name == "enumerate") return SubsetSearch::kEnumerate;
  if (name == "eliminate") return SubsetSearch::kEliminate;
  return SubsetSearch::kAuto;
}

int WritePlan(Session& session, const PlanFlags& flags, const CompressionPlan& plan) {
  const OrderedJson json = PlanToJson(plan);
  if (!flags.output.empty() && !session.flags.dry_run) {
    WriteFileAtomically(flags.output, json.dump(1) + "\n");
  }
  if (session.flags.json) {
    session.PrintJson(json);
  } else {
    session.Print(DescribePlan(plan));
    if (flags.output.empty()) session.Note("nothing was written; give -o PLAN to keep it");
  }
  return 0;
}

int PlanSkipping(Session& session, const PlanFlags& flags) {
  if (flags.objective != "unsquared" || flags.search != "auto" || flags.budget != "uniform" ||
      flags.floor > 0 || flags.no_guard) {
    throw UsageError("naee-skip takes none of --objective, --search, --budget, --floor, --no-guard",
                     "they belong to plans that remove experts");
  }
  if (flags.keep > 0 || flags.ratio > 0 || flags.compare || flags.curve) {
    throw UsageError(
        "naee-skip removes no experts: it takes no --keep, --ratio, --compare or --curve",
        "to do both, observe with --plan PRUNING and plan skipping from that");
  }
  if ((flags.active > 0) + (flags.max_error > 0) + (flags.quantile > 0) > 1) {
    throw UsageError("give one of --active, --max-error and --quantile",
                     "all say how much is skipped; without one the medians are taken");
  }
  if (!flags.output.empty()) RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  std::optional<SkipBudget> budget;
  if (flags.active > 0) budget = SkipBudget{.active_experts = flags.active};
  if (flags.max_error > 0) budget = SkipBudget{.max_error = flags.max_error};
  if (flags.quantile > 0) budget = SkipBudget{.quantile = flags.quantile};
  const StatsInfo info = ReadWeighedStats(session, flags.stats, flags.mix, flags.all_tokens);
  return WritePlan(session, flags,
                   MakeSkippingPlan(session, flags.stats, info, budget, flags.target));
}

std::vector<int32_t> ParseLayerList(const std::string& text) {
  std::vector<int32_t> layers;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) {
    int32_t layer = -1;
    const auto [end, problem] = std::from_chars(item.data(), item.data() + item.size(), layer);
    if (problem != std::errc() || end != item.data() + item.size() || layer < 0 ||
        std::find(layers.begin(), layers.end(), layer) != layers.end()) {
      throw UsageError(fmt::format("--moe-layers: \"{}\" is not a list of different numbers", text),
                       "write them as 1,4: indices among the MoE layers, from 0");
    }
    layers.push_back(layer);
  }
  return layers;
}

// Where streams go that the budget does not hold.
std::string SpillFolder(const PlanFlags& flags) {
  const fs::path folder =
      flags.output.empty() ? fs::temp_directory_path() : fs::absolute(flags.output).parent_path();
  return folder.string();
}

int PlanCondensing(Session& session, PlanFlags& flags) {
  if (flags.objective != "unsquared" || flags.search != "auto" || flags.budget != "uniform" ||
      flags.floor > 0 || flags.no_guard || flags.all_tokens || !flags.mix.empty() ||
      flags.keep > 0 || flags.ratio > 0 || flags.compare || flags.curve || flags.active > 0 ||
      flags.max_error > 0 || flags.quantile > 0 || !flags.mixed.neuron_stats.empty() ||
      flags.mixed.total > 0 || !flags.mixed.size.empty() || !flags.calibration.sources.empty()) {
    throw UsageError(
        "--method cd-moe and condense take --experts or --width, --layers or --moe-layers, "
        "--layer-order and --model",
        "the other flags belong to plans that prune or skip experts");
  }
  CondenseChoice& choice = flags.condense;
  const bool neurons = flags.method == "condense";
  if ((neurons ? choice.experts : flags.width) >= 0) {
    throw UsageError("--experts belongs to --method cd-moe, --width to --method condense",
                     "both say how wide a condensed layer stays, in experts");
  }
  if (neurons) choice.experts = flags.width;
  if (!IsCondenseStats(flags.stats) || ReadCondenseStats(flags.stats).method != flags.method) {
    throw UsageError(fmt::format("{} was not observed with --method {}", flags.stats, flags.method),
                     "plan by the method that was observed");
  }
  choice.moe_layers = ParseLayerList(flags.moe_layers);
  if (choice.experts < 0 || choice.model.empty() ||
      (choice.layers > 0) == !choice.moe_layers.empty()) {
    throw UsageError(
        "give --experts N (cd-moe) or --width N (condense), --model MODEL, and one of --layers M "
        "and --moe-layers A,B",
        "--layers searches for the layers that cost least; 0 experts keep the "
        "shared one alone");
  }
  choice.kl = flags.layer_order == "kl" || (neurons && flags.layer_order.empty());
  if (!flags.layer_order.empty() && choice.layers == 0) {
    throw UsageError("--layer-order is of a search: it goes with --layers",
                     "--moe-layers names the layers");
  }
  if (flags.target != "transformers" && flags.target != "winnow") {
    throw UsageError(fmt::format("--target {} does not load condensed layers", flags.target),
                     "leave --target out; see apply --stock and --export-code");
  }
  if (!flags.output.empty()) RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  choice.spill_folder = SpillFolder(flags);
  return WritePlan(session, flags, MakeCondensingPlan(session, flags.stats, choice, "winnow"));
}

int PlanMix(Session& session, PlanFlags& flags) {
  if (flags.objective != "unsquared" || flags.search != "auto" || flags.budget != "uniform" ||
      flags.floor > 0 || flags.no_guard || flags.keep > 0 || flags.ratio > 0 || flags.compare ||
      flags.curve || flags.active > 0 || flags.max_error > 0 || flags.quantile > 0 ||
      flags.condense.experts >= 0 || flags.width >= 0 || flags.condense.layers > 0 ||
      !flags.moe_layers.empty() || !flags.layer_order.empty() ||
      (flags.target != "transformers" && flags.target != "winnow")) {
    throw UsageError(
        "--method mix takes --with, --model, --mix, and --total or --size",
        "how many experts each layer keeps and which are condensed is what it decides");
  }
  flags.mixed.model = flags.condense.model;
  flags.mixed.spill_folder = SpillFolder(flags);
  if (flags.mixed.neuron_stats.empty() || flags.mixed.model.empty() ||
      (flags.mixed.total > 0) == !flags.mixed.size.empty()) {
    throw UsageError("give --with NEURON_STATS, --model MODEL, and one of --total N and --size S",
                     "NEURON_STATS come from observe --method condense; N counts experts over all "
                     "layers");
  }
  if (!flags.output.empty()) RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  const StatsInfo info = ReadWeighedStats(session, flags.stats, flags.mix, flags.all_tokens);
  std::vector<SourceBlocks> calibration;
  if (!flags.calibration.sources.empty()) {
    const Model model = Model::Open(flags.mixed.model);
    calibration = LoadCalibration(session, model, flags.mixed.model, flags.calibration);
  }
  const fs::path work =
      fs::path(flags.mixed.spill_folder) / fmt::format(".winnow-mix-{}", ::getpid());
  return WritePlan(session, flags,
                   MakeMixedPlan(session, flags.stats, info, flags.mixed, calibration, work));
}

// The number of survivors of E experts that --keep or --ratio asks for.
int64_t SurvivorsOf(Session& session, const PlanFlags& flags, int64_t experts) {
  if (flags.keep > 0) return flags.keep;
  const int64_t keep =
      experts - static_cast<int64_t>(std::llround(flags.ratio * static_cast<double>(experts)));
  session.Note(fmt::format(
      "removing {} of {} experts ({:.1f} %): keeping {}", experts - keep, experts,
      100.0 * static_cast<double>(experts - keep) / static_cast<double>(experts), keep));
  return keep;
}

// A checkpoint in place of statistics: what its weights alone can say.
int PlanWithoutText(Session& session, const PlanFlags& flags) {
  if (flags.method != "aimer" || flags.compare || flags.curve || flags.budget != "uniform" ||
      !flags.mix.empty() || flags.all_tokens || flags.objective != "unsquared" ||
      flags.search != "auto" || flags.floor > 0 || flags.no_guard) {
    throw UsageError(
        fmt::format("{} is a checkpoint, not statistics", flags.stats),
        "observe it first; --method aimer alone plans from weights without text, and takes no "
        "flag but --keep, --ratio, --target and -o");
  }
  const Model model = Model::Open(flags.stats);
  const StatsInfo info = DescribeModel(model);
  if (info.layers.empty()) {
    throw UsageError("the model has no Mixture-of-Experts layers", "there is nothing to remove");
  }
  const int64_t keep = SurvivorsOf(session, flags, info.layers.front().num_experts);
  return WritePlan(session, flags, MakeWeightsPlan(session, model, keep, flags.target));
}

int RunPlan(Session& session, PlanFlags& flags) {
  if (flags.method == "cd-moe" || flags.method == "condense") return PlanCondensing(session, flags);
  if (flags.method == "mix") return PlanMix(session, flags);
  if (!flags.calibration.sources.empty()) {
    throw UsageError("plan works from statistics; --calib is of --method mix alone",
                     "it heals what it compares there");
  }
  if (!flags.mixed.neuron_stats.empty() || flags.mixed.total > 0 || !flags.mixed.size.empty()) {
    throw UsageError("--with, --total and --size belong to --method mix",
                     "--keep or --ratio say how many experts stay");
  }
  if (flags.condense.experts >= 0 || flags.condense.layers > 0 || !flags.moe_layers.empty() ||
      !flags.condense.model.empty() || !flags.layer_order.empty() || flags.width >= 0) {
    throw UsageError(
        "--experts, --width, --layers, --moe-layers, --layer-order and --model belong to methods "
        "that condense",
        "observe with --method cd-moe or --method condense first");
  }
  if (flags.method == "naee-skip") return PlanSkipping(session, flags);
  if (flags.active > 0 || flags.max_error > 0 || flags.quantile > 0) {
    throw UsageError("--active, --max-error and --quantile belong to --method naee-skip",
                     "they skip experts at run time; --keep or --ratio remove them");
  }
  if (flags.curve ? flags.keep > 0 || flags.ratio > 0 : (flags.keep > 0) == (flags.ratio > 0)) {
    throw UsageError("give one of --keep R (experts kept), --ratio X (share removed) and --curve",
                     "--curve shows what every R would lose");
  }
  const bool uneven = flags.budget == "uneven";
  if (flags.curve && (flags.compare || uneven || flags.method != "naee" || !flags.output.empty() ||
                      flags.search != "auto" || flags.target != "transformers")) {
    throw UsageError("--curve is a table of NAEE's losses, printed",
                     "it takes none of --method, --search, --budget, --compare, --target and -o");
  }
  if (!flags.output.empty()) RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  const fs::path folder = flags.stats;
  if (IsCondenseStats(folder)) {
    throw UsageError(fmt::format("{} was observed with --method cd-moe or condense", flags.stats),
                     "plan with the same --method, or observe for pruning");
  }
  if (fs::exists(folder / "config.json") && !fs::exists(folder / "stats.json")) {
    return PlanWithoutText(session, flags);
  }
  const StatsInfo info = ReadWeighedStats(session, flags.stats, flags.mix, flags.all_tokens);
  PruningChoice choice;
  choice.method = flags.method;
  choice.naee = {
      .keep = flags.curve ? 0 : SurvivorsOf(session, flags, info.layers.front().num_experts),
      .search = ParseSearch(flags.search),
      .objective = ParseNaeeObjective(flags.objective)};
  choice.uneven = uneven;
  choice.floor = flags.floor;
  if (!flags.no_guard) choice.super_experts = NameSuperExperts(session, flags.stats, info);
  if (uneven && (flags.method != "naee" || flags.compare)) {
    throw UsageError("--budget uneven divides survivors by NAEE's errors: it needs --method naee",
                     "leave out --method and --compare");
  }
  if (uneven && (flags.objective != "unsquared" || flags.search != "auto")) {
    throw UsageError("--budget uneven takes neither --objective nor --search",
                     "it compares layers by the error relative to the stream, by elimination");
  }
  if (flags.method != "naee" && (flags.objective != "unsquared" || flags.search != "auto")) {
    throw UsageError(
        fmt::format("--method {} takes neither --objective nor --search", flags.method),
        "both belong to --method naee");
  }
  if (flags.floor > 0 && !uneven) {
    throw UsageError("--floor belongs to --budget uneven",
                     "leave it out: --keep is the number in every layer");
  }
  if (flags.curve) {
    PrintCurve(session, flags.stats, info, choice);
    return 0;
  }
  if (flags.compare) {
    ComparePruning(session, flags.stats, info, choice);
    return 0;
  }
  const CompressionPlan plan = MakePruningPlan(session, flags.stats, info, choice, flags.target);
  if (uneven) {
    session.Note(
        "not confirmed: eval ppl MODEL --plan shows it against a uniform plan on other text "
        "(compress does so by itself)");
  }
  return WritePlan(session, flags, plan);
}

}  // namespace

void AddPlan(CLI::App& app, Session& session) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* verb = app.add_subcommand("plan", "Decide from statistics what to remove, in seconds");
  verb->add_option("STATS", flags->stats, "Statistics folder; for --method aimer also a checkpoint")
      ->required();
  verb->add_option("--keep", flags->keep, "Experts kept in each layer")->check(WholeNumberFrom(1));
  verb->add_option("--ratio", flags->ratio, "Share of experts removed, e.g. 0.25")
      ->check(NumberFromTo(0.001, 0.999));
  verb->add_flag("--curve", flags->curve,
                 "Show the loss of every number of survivors; write nothing");
  verb->add_option(
      "--method", flags->method,
      "naee (least loss of the output), a score (frequency, seer, ean, weighted-ean,\n"
      "reap, man, msan, easy-ep, aimer, leave-one-out), naee-skip: skip experts\n"
      "at run time, cd-moe or condense: condense layers (observed with the same), or mix:\n"
      "prune some layers and condense others");
  verb->add_option("--with", flags->mixed.neuron_stats,
                   "mix: statistics of observe --method condense, beside full ones");
  verb->add_option("--total", flags->mixed.total,
                   "mix: experts left over all layers, condensed ones by their width")
      ->check(WholeNumberFrom(1));
  verb->add_option("--size", flags->mixed.size, "mix: what the weights may take, e.g. 9G");
  flags->calibration.blocks.blocks_per_document = 1;
  AddCalibrationFlags(*verb, flags->calibration, false);
  verb->add_option("--experts", flags->condense.experts,
                   "cd-moe: experts a condensed layer keeps beside the shared one; 0: none")
      ->check(WholeNumberFrom(0));
  verb->add_option(
          "--width", flags->width,
          "condense: experts' worth of neurons a condensed layer keeps beside the shared one")
      ->check(WholeNumberFrom(0));
  verb->add_option("--layers", flags->condense.layers,
                   "cd-moe, condense: how many layers to condense")
      ->check(WholeNumberFrom(1));
  verb->add_option("--moe-layers", flags->moe_layers,
                   "cd-moe, condense: these layers (1,4: among the MoE layers), no search");
  verb->add_option("--layer-order", flags->layer_order,
                   "greedy (cd-moe's default, as published) or kl (condense's): by each layer's\n"
                   "effect on the logits")
      ->check(CLI::IsMember({"greedy", "kl"}));
  verb->add_option("--model", flags->condense.model,
                   "cd-moe, condense: the checkpoint that was observed");
  verb->add_flag("--compare", flags->compare, "Show what every method would drop; write nothing");
  verb->add_option("--mix", flags->mix,
                   "Weigh the texts anew: prose=1,code=3 multiplies their sums (default 1 each)");
  verb->add_flag("--all-tokens", flags->all_tokens,
                 "Count all tokens alike, whatever the mask of the data says");
  verb->add_flag("--no-guard", flags->no_guard,
                 "Let experts with rare but huge activations go like others");
  verb->add_option(
      "--objective", flags->objective,
      "naee: unsquared (as published), squared, relative-to-output, relative-to-stream");
  verb->add_option("--search", flags->search,
                   "naee: enumerate, eliminate (then exchanges), or auto: by the number of subsets")
      ->check(CLI::IsMember({"auto", "enumerate", "eliminate"}));
  verb->add_option("--budget", flags->budget,
                   "naee: uniform, or uneven: R x layers survivors in all, where they matter most")
      ->check(CLI::IsMember({"uniform", "uneven"}));
  verb->add_option("--floor", flags->floor, "Fewest survivors of a layer with --budget uneven")
      ->check(WholeNumberFrom(1));
  verb->add_option("--active", flags->active,
                   "naee-skip: mean experts a token, spent where it costs least (default: medians)")
      ->check(NumberFromTo(1, 128));
  verb->add_option("--max-error", flags->max_error,
                   "naee-skip: skip until the layers' relative errors add up to this")
      ->check(NumberFromTo(1e-9, 1e3));
  verb->add_option("--quantile", flags->quantile,
                   "naee-skip: skip this share of the ranks after the first in every layer")
      ->check(NumberFromTo(0.001, 0.999));
  verb->add_option("--target", flags->target,
                   "Loader the result must satisfy: transformers, vllm, llama.cpp, winnow");
  verb->add_option("-o,--output", flags->output, "plan.json to write")->transform(OutputPath);
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, false);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow plan STATS --keep 6 -o plan.json");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunPlan(session, *flags); };
  });
}

}  // namespace winnow::cli
