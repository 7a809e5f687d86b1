// winnow compress: observe, plan, apply and evaluate in one command.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "apply/checkpoint_rewriter.h"
#include "apply/model_card.h"
#include "base/error.h"
#include "base/file.h"
#include "base/units.h"
#include "calibration.h"
#include "compressing.h"
#include "evaluation.h"
#include "healing.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "plan/loader_target.h"
#include "planning.h"
#include "pruning.h"
#include "session.h"
#include "sizing.h"

namespace winnow::cli {
namespace {

void CheckFlags(const CompressFlags& flags) {
  if (flags.keep > 0 && !flags.size.empty()) {
    throw UsageError("give either --keep or --size", "--size finds the number of survivors");
  }
  if (flags.keep == 0 && flags.size.empty() && flags.active == 0 && flags.max_increase.empty()) {
    throw UsageError("nothing says how much is to go",
                     "give --keep R, --size 9G, --max-ppl-increase 5% or --active X");
  }
  if (flags.progressive && flags.keep == 0) {
    throw UsageError("--progressive chooses while it observes: it needs --keep R",
                     "add --keep, or leave --progressive out");
  }
  if (flags.progressive && flags.budget == "uneven") {
    throw UsageError("--progressive chooses the same number of survivors in every layer",
                     "leave out --progressive or --budget uneven");
  }
  if (flags.budget == "uneven" && flags.keep == 0 && flags.size.empty() &&
      flags.max_increase.empty()) {
    throw UsageError("--budget uneven divides survivors, and --active alone removes none",
                     "add --keep R, or leave --budget out");
  }
  if (flags.progressive && flags.active > 0) {
    throw UsageError("--active is planned from a second pass, which --progressive has no place for",
                     "leave one of them out");
  }
  if (!flags.max_increase.empty()) ParseIncrease(flags.max_increase);
  if (!flags.size.empty()) ParseBytes(flags.size, "--size");
  CheckTargetName(flags.target);
  if (flags.budget == "uneven" && flags.target != "winnow") {
    throw UsageError(
        fmt::format("--budget uneven: {} needs the same number of experts in every layer",
                    flags.target),
        "add --target winnow if Winnow alone is to run the result");
  }
}

// How a refused run is repeated without observing again.
std::string KeptStatistics(const CompressFlags& flags) {
  return fmt::format("--resume goes on from the statistics in {}.work", flags.output);
}

// A plan with its healed weights, and the perplexity on the judging sequences over the original's.
struct Candidate {
  int64_t keep = 0;
  CompressionPlan plan;
  Healing healing;
  std::optional<double> increase = {};
};

// The most survivors of every layer: one expert less than the smallest has.
int64_t MostKept(const StatsInfo& info) {
  int64_t least_experts = INT64_MAX;
  for (const StatsLayer& layer : info.layers) {
    least_experts = std::min(least_experts, layer.num_experts);
  }
  return least_experts - 1;
}

// As large as any plan that keeps so many.
CompressionPlan KeepingTheFirst(const StatsInfo& info, int64_t keep) {
  CompressionPlan plan;
  for (const StatsLayer& layer : info.layers) {
    LayerPlan first;
    first.layer = layer.layer;
    for (int32_t e = 0; e < keep; ++e) first.kept.push_back(e);
    plan.layers.push_back(first);
  }
  return plan;
}

// Whether there is text enough to heal with; refuses what the budget does not hold.
bool CanHeal(Session& session, const Model& model, const std::vector<SourceBlocks>& sources,
             const StatsInfo& info, int64_t keep) {
  try {
    PrepareHeal(session, model, KeepingTheFirst(info, keep), sources);
    return true;
  } catch (const UsageError& problem) {
    session.Warn(fmt::format("without healing: {}", problem.what()));
    return false;
  }
}

// The statistics, from an earlier unfinished run if it got that far.
StatsInfo Observe(Session& session, CompressFlags& flags, const Model& model,
                  const std::vector<SourceBlocks>& sources, const fs::path& stats) {
  ObserveOptions& options = flags.observe;
  options.level = StatsLevel::kFull;
  if (flags.progressive) {
    options.progressive_keep = flags.keep;
    options.choose = [&session, &flags](const fs::path& folder, const StatsInfo& info,
                                        const StatsLayer& layer) {
      const LayerStatsReader records(folder, info, layer);
      return ChooseNaee(records, info, layer, {.keep = flags.keep}, session.pool(),
                        session.control())
          .kept;
    };
  }
  const ObservePlan plan = PrepareObserve(session, model, sources, options, stats.string());
  if (flags.keep > 0) CheckNaee(plan.info, {.keep = flags.keep});
  if (flags.active > 0) CheckNaeeSkip(plan.info, SkipBudget{.active_experts = flags.active});
  if (!flags.max_increase.empty() || flags.budget == "uneven") {
    try {
      JudgingSequences(sources);
    } catch (const UsageError& problem) {
      throw UsageError(
          fmt::format("{} is judged by one calibration sequence in ten, and there are too few",
                      flags.budget == "uneven" ? "--budget uneven" : "--max-ppl-increase"),
          problem.hint());
    }
  }
  // What does not fit is found out now, not after hours of observing: any choice of R holds the
  // same.
  if (!flags.prunes()) flags.no_heal = true;
  if (!flags.no_heal) {
    flags.no_heal = !CanHeal(session, model, sources, plan.info,
                             flags.keep > 0 ? flags.keep : MostKept(plan.info));
  }
  if (session.flags.dry_run) {
    session.PrintDryRun("compress", DescribeObserve(plan));
    return plan.info;
  }
  if (HasFinishedStats(session, stats, plan.info)) return plan.info;
  // Only now: what is refused above leaves nothing behind.
  if (!session.flags.resume) fs::remove_all(stats.parent_path());
  fs::create_directories(stats.parent_path());
  if (fs::exists(flags.output)) WriteFileAtomically(stats.parent_path() / kReplacesName, "");
  RunObserve(model, sources, options, plan, stats, session.pool(), session.control());
  return plan.info;
}

// The most survivors whose checkpoint is within --size.
int64_t LargestWithin(const Model& model, const std::string& size) {
  const uint64_t bytes = ParseBytes(size, "--size");
  const StatsInfo info = DescribeModel(model);
  if (model.checkpoint().total_bytes() <= bytes) {
    throw UsageError(fmt::format("--size {}: the model has {} of weights, which fits already", size,
                                 FormatBytes(model.checkpoint().total_bytes())),
                     "give a smaller size, or say with --keep how many experts are to stay");
  }
  uint64_t smallest = model.checkpoint().total_bytes();
  for (int64_t keep = info.layers.empty() ? 0 : MostKept(info); keep >= info.num_experts_per_tok;
       --keep) {
    smallest = PlanRewrite(model, KeepingTheFirst(info, keep), {}).bytes_after;
    if (smallest <= bytes) return keep;
  }
  throw QualityError(
      fmt::format(
          "--size {}: the weights still take {} with {} experts a layer, the fewest a token uses",
          size, FormatBytes(smallest), info.num_experts_per_tok),
      "give a larger size");
}

// The survivors of each layer for one number of them, healed unless --no-heal.
class Chooser {
 public:
  Chooser(Session& session, const CompressFlags& flags, const Model& model,
          const std::vector<SourceBlocks>& sources, const StatsInfo& info, const fs::path& work)
      : session_(session),
        flags_(flags),
        model_(model),
        sources_(sources),
        info_(info),
        work_(work) {
    super_experts_ = NameSuperExperts(session, work / "stats", info);
  }

  int64_t least() const { return info_.num_experts_per_tok; }
  int64_t most() const { return MostKept(info_); }

  Candidate Keep(int64_t keep) {
    Candidate candidate{.keep = keep, .plan = Plan(keep), .healing = {}};
    session_.Note(DescribePlan(candidate.plan));
    if (flags_.active > 0) AddSkipping(candidate.plan);
    if (!flags_.no_heal) {
      candidate.healing =
          Heal(session_, model_, candidate.plan,
               PrepareHeal(session_, model_, candidate.plan, sources_), HealedFolder(keep));
      const HealResult& result = candidate.healing.result;
      const double nll = result.improves() ? result.healed.nll : result.pruned.nll;
      candidate.increase = std::exp(nll - result.intact.nll) - 1;
    } else if (!flags_.max_increase.empty()) {
      candidate.increase = Increase(candidate.plan);
    }
    return candidate;
  }

  // Nothing removed, but skipped at run time.
  Candidate SkipOnly() {
    Candidate candidate;
    candidate.keep = most() + 1;
    candidate.plan = MakeSkippingPlan(session_, work_ / "stats", info_,
                                      SkipBudget{.active_experts = flags_.active}, flags_.target);
    session_.Note(DescribePlan(candidate.plan));
    if (!flags_.max_increase.empty()) candidate.increase = Increase(candidate.plan);
    return candidate;
  }

  // The fewest survivors that pass, by bisection: more survivors are taken to lose less.
  Candidate SmallestPassing(double limit) {
    const auto passes = [&](const Candidate& candidate) {
      const bool passed = *candidate.increase <= limit;
      session_.Note(fmt::format(
          "keeping {}: perplexity {:+.2f} % on the judging sequences, {} the limit of {:.2f} %",
          candidate.keep, 100 * *candidate.increase, passed ? "within" : "above", 100 * limit));
      return passed;
    };
    Candidate best = Keep(most());
    if (!passes(best)) {
      throw QualityError(
          fmt::format(
              "perplexity rises by {:.2f} % with one expert a layer gone, more than {:.2f} %",
              100 * *best.increase, 100 * limit),
          fmt::format("allow more, or try --budget uneven --target winnow: {}",
                      KeptStatistics(flags_)));
    }
    int64_t fails = least() - 1;
    while (best.keep - fails > 1) {
      const int64_t keep = (best.keep + fails) / 2;
      Candidate candidate = Keep(keep);
      const bool passed = passes(candidate);
      const int64_t worse = passed ? best.keep : keep;
      if (passed) {
        best = std::move(candidate);
      } else {
        fails = keep;
        candidate = {};
      }
      fs::remove_all(HealedFolder(worse));
    }
    return best;
  }

  // Of a plan's skipping and pruning, unhealed, over the original.
  double Increase(const CompressionPlan& plan) {
    const int64_t num_layers = model_.config().num_layers();
    return std::exp(Judge(model_, {.kept_experts = KeptExperts(plan, num_layers),
                                   .skip_betas = SkipBetasOf(plan, num_layers)}) -
                    IntactNll()) -
           1;
  }
  // Of a written checkpoint.
  double IncreaseOf(const Model& smaller) {
    return std::exp(Judge(smaller, {.skip_betas = SkippingOf(smaller, "", false)}) - IntactNll()) -
           1;
  }

 private:
  fs::path HealedFolder(int64_t keep) const { return work_ / fmt::format("healed-{}", keep); }
  CompressionPlan Plan(int64_t keep) {
    PruningChoice choice;
    choice.naee.keep = keep;
    choice.super_experts = super_experts_;
    const fs::path stats = work_ / "stats";
    const CompressionPlan uniform = MakePruningPlan(session_, stats, info_, choice, flags_.target);
    if (flags_.budget != "uneven") return uniform;
    choice.uneven = true;
    const CompressionPlan uneven = MakePruningPlan(session_, stats, info_, choice, flags_.target);
    return BetterPlan(session_, model_, sources_, uneven, uniform, work_.string());
  }
  // Thresholds re-measured on the pruned model (arXiv 2402.14800, section 3.3), not yet healed.
  void AddSkipping(CompressionPlan& plan) {
    const fs::path stats = work_ / fmt::format("stats-of-{}", plan.layers.front().kept.size());
    ObserveOptions options = flags_.observe;
    options.level = StatsLevel::kFull;
    options.kept_experts = KeptExperts(plan, model_.config().num_layers());
    const ObservePlan observe = PrepareObserve(session_, model_, sources_, options, stats.string());
    if (!HasFinishedStats(session_, stats, observe.info)) {
      RunObserve(model_, sources_, options, observe, stats, session_.pool(), session_.control());
    }
    const CompressionPlan skipping = MakeSkippingPlan(
        session_, stats, observe.info, SkipBudget{.active_experts = flags_.active}, flags_.target);
    for (size_t i = 0; i < plan.layers.size(); ++i) plan.layers[i].beta = skipping.layers[i].beta;
    plan.method += "+" + skipping.method;
    fs::remove_all(stats);
  }
  double Judge(const Model& model, const EvalRun& run) {
    const std::vector<EvalText> judge = {{"calibration", JudgingSequences(sources_)}};
    return Evaluate(session_, model, judge, run, work_.string()).texts.front().nll;
  }
  double IntactNll() {
    if (!intact_nll_) intact_nll_ = Judge(model_, {.skip_betas = SkippingOf(model_, "", false)});
    return *intact_nll_;
  }

  Session& session_;
  const CompressFlags& flags_;
  const Model& model_;
  const std::vector<SourceBlocks>& sources_;
  const StatsInfo& info_;
  fs::path work_;
  std::vector<SuperExpert> super_experts_;
  std::optional<double> intact_nll_;
};

Candidate Choose(Chooser& chooser, const CompressFlags& flags) {
  if (!flags.prunes()) return chooser.SkipOnly();
  if (flags.searches()) return chooser.SmallestPassing(ParseIncrease(flags.max_increase));
  return chooser.Keep(flags.keep);
}

// A gate the user set, on what was measured.
void RequireIncrease(const CompressFlags& flags, double increase) {
  const double limit = ParseIncrease(flags.max_increase);
  if (increase <= limit) return;
  throw QualityError(
      fmt::format("perplexity on the judging sequences rises by {:.2f} %, more than {:.2f} %",
                  100 * increase, 100 * limit),
      fmt::format("keep more, run more experts a token, or allow more: {}", KeptStatistics(flags)));
}

int RunCompress(Session& session, CompressFlags& flags) {
  const bool all_means = SizesByAllMeans(flags);
  if (flags.target.empty()) flags.target = all_means ? "winnow" : "transformers";
  CheckFlags(flags);
  CheckSizingFlags(flags);
  if (all_means) return RunSizing(session, flags);
  if (!flags.size.empty() && flags.target != "winnow") {
    session.Note(fmt::format(
        "--size for {}: experts are dropped; fewer bits and condensed layers need --target winnow",
        flags.target));
  }
  const fs::path work = flags.output + ".work";
  ClaimWorkFolder(work, session.flags, IsOfWork);
  // Interrupted while evaluating: the checkpoint is complete, only its measurements are missing.
  // But OUT may also be what an interrupted --force was about to replace.
  const fs::path replaces = work / kReplacesName;
  if (session.flags.resume && fs::exists(replaces)) session.flags.force = true;
  const bool applied_before = session.flags.resume && fs::exists(work) && !fs::exists(replaces) &&
                              fs::exists(fs::path(flags.output) / "winnow-plan.json");
  if (!applied_before) {
    RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  }
  const Model model = Model::Open(flags.model);
  if (!flags.size.empty()) flags.keep = LargestWithin(model, flags.size);
  // What could be wrong with the evaluation is found out before hours of observing.
  std::vector<EvalText> texts;
  const PerplexityProtocol protocol = FindProtocol(flags.protocol);
  if (!flags.texts.empty()) {
    texts = LoadEvalTexts(model, flags.model, flags.texts, flags.calibration.blocks.field, protocol,
                          flags.max_tokens);
  }
  const fs::path stats = work / "stats";
  const std::vector<SourceBlocks> sources =
      LoadCalibration(session, model, flags.model, flags.calibration);
  const StatsInfo info = Observe(session, flags, model, sources, stats);
  if (session.flags.dry_run) return 0;  // Observe() has said it
  ReportCoverage(session, stats, info);
  Chooser chooser(session, flags, model, sources, info, work);
  Candidate chosen = Choose(chooser, flags);
  const CompressionPlan& plan = chosen.plan;
  // Healed and skipping models are measured once they are written.
  const bool measured_late = flags.active > 0 && !flags.no_heal && !flags.max_increase.empty();
  if (!flags.max_increase.empty() && !measured_late) RequireIncrease(flags, *chosen.increase);
  ApplyOptions options;
  options.resume = session.flags.resume;
  if (!flags.no_heal) {
    // A finished checkpoint was healed already; its weights are on disk and only read back.
    options.replacements = &chosen.healing.weights;
    options.changes = chosen.healing.card;
  }
  const RewritePlan rewrite = PlanRewrite(model, plan, options);
  ApplyResult applied;
  if (!applied_before) {
    const fs::path written = measured_late ? work / kCandidateName : fs::path(flags.output);
    applied = ApplyPlan(model, plan, rewrite, options, written, session.control());
    if (measured_late) {
      const double increase = chooser.IncreaseOf(Model::Open(written.string()));
      if (increase > ParseIncrease(flags.max_increase)) fs::remove_all(written);
      RequireIncrease(flags, increase);
      fs::remove_all(flags.output);
      RenameDurably(written, flags.output);
    }
    fs::remove(replaces);
  } else if (PlanToJson(ReadPlan(fs::path(flags.output) / "winnow-plan.json")) !=
             PlanToJson(plan)) {
    throw UsageError(fmt::format("{} was made with another model, text or flag", flags.output),
                     "repeat the command as it was, or start again with --force");
  }
  const double pruned_seconds = session.seconds();
  TextMeasurements measured;
  if (!texts.empty()) {
    measured =
        MeasureTexts(session, model, Model::Open(flags.output), texts, protocol, work.string());
    WriteFileAtomically(fs::path(flags.output) / CardFileName(model.checkpoint()),
                        ModelCard(plan, rewrite, CardChanges(options), measured.card));
  }
  if (!flags.keep_stats) fs::remove_all(work);
  if (session.flags.json) {
    OrderedJson json = {{"schema", "winnow.compress/1"},
                        {"output", flags.output},
                        {"bytes_before", rewrite.bytes_before},
                        {"bytes_after", rewrite.bytes_after},
                        {"seconds", pruned_seconds},
                        {"apply_seconds", applied.seconds},
                        {"peak_rss_bytes", PeakResidentBytes()},
                        {"plan", PlanToJson(plan)}};
    if (!flags.no_heal) json["healing"] = chosen.healing.json;
    if (chosen.increase) json["judged_increase"] = *chosen.increase;
    if (!measured.rows.empty()) json["eval"] = EvalJson(measured.rows, flags.protocol);
    session.PrintJson(json);
    return 0;
  }
  session.Print(fmt::format(
      "{}: {} -> {} ({:.0f} % of the weights), {} of {} experts a layer{}", flags.output,
      FormatBytes(rewrite.bytes_before), FormatBytes(rewrite.bytes_after),
      100.0 * static_cast<double>(rewrite.bytes_after) / static_cast<double>(rewrite.bytes_before),
      chosen.keep, info.layers.front().num_experts, flags.budget == "uneven" ? " on average" : ""));
  session.Print(fmt::format("pruned in {}, peak memory {}", FormatSeconds(pruned_seconds),
                            FormatBytes(PeakResidentBytes())));
  PrintMeasurements(session, measured, flags);
  return 0;
}

}  // namespace

void AddCompress(CLI::App& app, Session& session) {
  auto flags = std::make_shared<CompressFlags>();
  flags->calibration.blocks.blocks_per_document = 1;
  CLI::App* verb = app.add_subcommand("compress", "Observe, plan, apply and evaluate in one");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("--keep", flags->keep, "Experts to keep in each layer")
      ->check(WholeNumberFrom(1));
  verb->add_option(
      "--size", flags->size,
      "All weight files take this much at most, e.g. 9G: by dropping experts, condensing\n"
      "layers and fewer bits, whichever loses least (--target winnow, the default\n"
      "here); for other targets, and with --active or --budget, by dropping alone");
  verb->add_option("--means", flags->means,
                   "With --size: what may be tried, of drop,condense,bits (default: all)");
  verb->add_option("--bits-of-rest", flags->bits_of_rest,
                   "With --size and bits: format of attention, shared expert, dense layers and\n"
                   "lm_head, or stored (default 8bit)");
  verb->add_option("--max-ppl-increase", flags->max_increase,
                   "e.g. 5%: alone, keep as few as pass on the judging tenth of the calibration\n"
                   "text; beside the others, refuse (exit 5) what does not pass");
  verb->add_option("--active", flags->active,
                   "Also skip experts at run time: mean experts a token (alone: remove none)")
      ->check(NumberFromTo(1, 128));
  AddCalibrationFlags(*verb, flags->calibration);
  verb->add_option("-o,--output", flags->output, "Checkpoint folder to write")
      ->required()
      ->transform(OutputPath);
  verb->add_option("-f,--text", flags->texts, "Texts to measure perplexity on, before and after");
  verb->add_option("--protocol", flags->protocol, "Perplexity protocol (default bos-512)");
  verb->add_option("--tokens", flags->max_tokens, "Tokens of each text (default 8192)")
      ->check(WholeNumberFrom(1));
  verb->add_flag("--progressive", flags->progressive,
                 "Choose each layer on the already pruned stream");
  verb->add_option("-b,--batch", flags->observe.batch,
                   "Sequences in a batch of the published loss (default 8)")
      ->check(WholeNumberFrom(1));
  verb->add_option("--target", flags->target,
                   "Loader the result must satisfy: transformers, vllm, llama.cpp, winnow\n"
                   "(default: winnow with --size, else transformers)");
  verb->add_option("--budget", flags->budget,
                   "uniform, or uneven: R x layers survivors in all, if held-out text confirms it")
      ->check(CLI::IsMember({"uniform", "uneven"}));
  verb->add_flag("--no-heal", flags->no_heal,
                 "Leave the survivors as they are (default: refit their down projections)");
  verb->add_flag("--keep-stats", flags->keep_stats, "Leave the statistics in OUT.work");
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, true);
  session.AddReportFlags(*verb);
  verb->footer(
      "Example: winnow compress MODEL --keep 6 --calib text.txt -o SMALLER --text eval.txt");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunCompress(session, *flags); };
  });
}

}  // namespace winnow::cli
