// winnow compress: observe, plan, apply and evaluate in one command.
#include <fmt/format.h>

#include "apply/checkpoint_rewriter.h"
#include "apply/model_card.h"
#include "base/error.h"
#include "base/file.h"
#include "base/units.h"
#include "calibration.h"
#include "evaluation.h"
#include "healing.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "plan/loader_target.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

// In OUT.work: OUT is an older checkpoint that this run replaces.
constexpr const char* kReplacesName = "replaces";

struct CompressFlags {
  std::string model, output, protocol = "bos-512", target = "transformers", budget = "uniform";
  CalibrationFlags calibration;
  std::vector<std::string> texts;
  ObserveOptions observe;
  int64_t keep = 0, max_tokens = 8192;
  bool progressive = false, keep_stats = false, no_heal = false;
};

// What an interrupted or --keep-stats run leaves: nothing but these.
bool IsWorkFolder(const fs::path& work) {
  if (!fs::is_directory(work)) return false;
  for (const fs::directory_entry& entry : fs::directory_iterator(work)) {
    const std::string name = entry.path().filename().string();
    if (name != "stats" && name != "stats.partial" && name != "healed" && name != kReplacesName &&
        !name.ends_with(".spill")) {
      return false;
    }
  }
  return true;
}

// Whether there is text enough to heal with; refuses what the budget does not hold.
bool CanHeal(Session& session, const Model& model, const std::vector<SourceBlocks>& sources,
             const StatsInfo& info, int64_t keep) {
  CompressionPlan any;
  for (const StatsLayer& layer : info.layers) {
    LayerPlan first;
    first.layer = layer.layer;
    for (int32_t e = 0; e < keep; ++e) first.kept.push_back(e);
    any.layers.push_back(first);
  }
  try {
    PrepareHeal(session, model, any, sources);
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
  CheckNaee(plan.info, {.keep = flags.keep});
  // What does not fit is found out now, not after hours of observing: any choice of R holds the
  // same.
  if (!flags.no_heal) flags.no_heal = !CanHeal(session, model, sources, plan.info, flags.keep);
  if (session.flags.dry_run) {
    session.PrintDryRun("compress", DescribeObserve(plan));
    return plan.info;
  }
  if (session.flags.resume && fs::exists(stats / "stats.json")) {
    const StatsInfo finished = ReadStatsInfo(stats);
    if (StatsInfoToJson(finished) != StatsInfoToJson(plan.info)) {
      throw UsageError(fmt::format("{} was made with another model, text or flag", stats.string()),
                       "repeat the command as it was, or start again with --force");
    }
    return finished;
  }
  // Only now: what is refused above leaves nothing behind.
  if (!session.flags.resume) fs::remove_all(stats.parent_path());
  fs::create_directories(stats.parent_path());
  if (fs::exists(flags.output)) WriteFileAtomically(stats.parent_path() / kReplacesName, "");
  RunObserve(model, sources, options, plan, stats, session.pool(), session.control());
  return plan.info;
}

int RunCompress(Session& session, CompressFlags& flags) {
  const fs::path work = flags.output + ".work";
  if (fs::exists(work) && session.flags.force && !IsWorkFolder(work)) {
    throw UsageError(
        fmt::format("{} was not written by winnow, so --force leaves it alone", work.string()),
        "choose another name with -o, or remove it yourself");
  }
  if (fs::exists(work) && !session.flags.resume && !session.flags.force) {
    throw UsageError(fmt::format("{} is left from an interrupted run", work.string()),
                     "go on with --resume, or start again with --force");
  }
  // Interrupted while evaluating: the checkpoint is complete, only its measurements are missing.
  // But OUT may also be what an interrupted --force was about to replace.
  const fs::path replaces = work / kReplacesName;
  if (session.flags.resume && fs::exists(replaces)) session.flags.force = true;
  const bool applied_before = session.flags.resume && fs::exists(work) && !fs::exists(replaces) &&
                              fs::exists(fs::path(flags.output) / "winnow-plan.json");
  if (!applied_before) {
    RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  }
  CheckTargetName(flags.target);
  if (flags.budget == "uneven" && flags.target != "winnow") {
    throw UsageError(
        fmt::format("--budget uneven: {} needs the same number of experts in every layer",
                    flags.target),
        "add --target winnow if Winnow alone is to run the result");
  }
  const Model model = Model::Open(flags.model);
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
  CompressionPlan plan =
      MakePruningPlan(session, stats, info, {.naee = {.keep = flags.keep}}, flags.target);
  if (flags.budget == "uneven") {
    const CompressionPlan uneven = MakePruningPlan(
        session, stats, info, {.naee = {.keep = flags.keep}, .uneven = true}, flags.target);
    plan = BetterPlan(session, model, sources, uneven, plan, work.string());
  }
  session.Note(DescribePlan(plan));
  ApplyOptions options;
  options.resume = session.flags.resume;
  Healing healing;
  if (!flags.no_heal) {
    // A finished checkpoint was healed already; its weights are on disk and only read back.
    healing =
        Heal(session, model, plan, PrepareHeal(session, model, plan, sources), work / "healed");
    options.replacements = &healing.weights;
    options.changes = healing.card;
  }
  const RewritePlan rewrite = PlanRewrite(model, plan, options);
  ApplyResult applied;
  if (!applied_before) {
    applied = ApplyPlan(model, plan, rewrite, options, flags.output, session.control());
    fs::remove(replaces);
  } else if (PlanToJson(ReadPlan(fs::path(flags.output) / "winnow-plan.json")) !=
             PlanToJson(plan)) {
    throw UsageError(fmt::format("{} was made with another model, text or flag", flags.output),
                     "repeat the command as it was, or start again with --force");
  }
  const double pruned_seconds = session.seconds();
  std::vector<EvalRow> rows;
  if (!flags.texts.empty()) {
    const std::string spill = work.string();
    const Model smaller = Model::Open(flags.output);
    const auto before =
        Evaluate(session, model, texts, {.skip_betas = SkippingOf(model, "", false)}, spill).texts;
    const auto after = Evaluate(session, smaller, texts, {}, spill).texts;
    for (size_t i = 0; i < texts.size(); ++i) rows.push_back({texts[i].name, after[i], before[i]});
    std::string measured = fmt::format(
        "Protocol `{}`: {}.\n\n| text | tokens | original | pruned | d nll +- s.e. |\n"
        "|---|--:|--:|--:|--:|\n",
        protocol.name, protocol.description);
    for (const EvalRow& row : rows) {
      const PairedDifference d = Compare(*row.original, row.result);
      measured += fmt::format("| {} | {} | {:.3f} | {:.3f} | {:+.4f} +- {} |\n", row.name,
                              FormatCount(static_cast<uint64_t>(row.result.tokens)),
                              row.original->perplexity, row.result.perplexity, d.nll,
                              FormatStandardError(d.standard_error));
    }
    WriteFileAtomically(fs::path(flags.output) / CardFileName(model.checkpoint()),
                        ModelCard(plan, rewrite, CardChanges(options), measured));
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
    if (!flags.no_heal) json["healing"] = healing.json;
    if (!rows.empty()) json["eval"] = EvalJson(rows, flags.protocol);
    session.PrintJson(json);
    return 0;
  }
  session.Print(fmt::format(
      "{}: {} -> {} ({:.0f} % of the weights), {} of {} experts a layer{}", flags.output,
      FormatBytes(rewrite.bytes_before), FormatBytes(rewrite.bytes_after),
      100.0 * static_cast<double>(rewrite.bytes_after) / static_cast<double>(rewrite.bytes_before),
      flags.keep, info.layers.front().num_experts, flags.budget == "uneven" ? " on average" : ""));
  session.Print(fmt::format("pruned in {}, peak memory {}", FormatSeconds(pruned_seconds),
                            FormatBytes(PeakResidentBytes())));
  if (!rows.empty()) {
    session.Print(EvalTable(rows, flags.protocol));
  } else {
    session.Note(fmt::format(
        "nothing was measured: winnow eval ppl {} --text FILE --against {} compares the two",
        flags.output, flags.model));
  }
  return 0;
}

}  // namespace

void AddCompress(CLI::App& app, Session& session) {
  auto flags = std::make_shared<CompressFlags>();
  flags->calibration.blocks.blocks_per_document = 1;
  CLI::App* verb = app.add_subcommand("compress", "Observe, plan, apply and evaluate in one");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("--keep", flags->keep, "Experts to keep in each layer")
      ->required()
      ->check(WholeNumberFrom(1));
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
                   "Loader the result must satisfy: transformers, vllm, llama.cpp, winnow");
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
