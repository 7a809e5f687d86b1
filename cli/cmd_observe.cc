// winnow observe: one pass over calibration text, gathers statistics.
#include <fmt/format.h>

#include "base/error.h"
#include "base/units.h"
#include "calibration.h"
#include "condensing.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "observe_rounds.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct ObserveFlags {
  std::string model, output, stats, plan, method = "naee";
  CondenseFlags condense;
  CalibrationFlags calibration;
  ObserveOptions options;
  bool progressive = false, repair_drift = false, until_stable = false;
  int64_t keep = 0, width = -1;
};

// What observing gave, however many sweeps it took.
void Report(Session& session, const ObserveFlags& flags, const StatsInfo& info,
            const OrderedJson& more) {
  const OrderedJson coverage = ReportCoverage(session, flags.output, info);
  if (!session.flags.json) return;
  OrderedJson json = {{"schema", "winnow.observe/1"},
                      {"output", flags.output},
                      {"level", StatsLevelName(info.level)},
                      {"tokens", info.num_tokens()},
                      {"coverage", coverage}};
  json.update(more);
  json["bytes_read"] = BytesReadByProcess();
  json["peak_rss_bytes"] = PeakResidentBytes();
  session.PrintJson(json);
}

int RunRounds(Session& session, ObserveFlags& flags, const Model& model,
              const std::vector<SourceBlocks>& sources) {
  if (session.flags.dry_run) {
    const ObservePlan plan = PrepareObserve(session, model, sources, flags.options, flags.output);
    CheckNaee(plan.info, {.keep = flags.keep});
    session.PrintDryRun("observe", DescribeObserve(plan));
    return 0;
  }
  const double start = session.seconds();
  const ObservedRounds result =
      ObserveUntilStable(session, model, sources, flags.options, flags.keep, flags.output);
  const double seconds = session.seconds() - start;
  Report(session, flags, result.info,
         {{"seconds", seconds},
          {"stable", result.stable},
          {"rounds", result.rounds},
          {"weight_bytes_read", result.weight_bytes_read}});
  if (!session.flags.json) {
    session.Note(fmt::format("wrote {}: {} sweeps, {} of weights read", flags.output,
                             result.rounds.size(), FormatBytes(result.weight_bytes_read)));
    session.PrintUsage();
  }
  return 0;
}

int RunCondenseVerb(Session& session, ObserveFlags& flags) {
  if (flags.progressive || flags.repair_drift || flags.until_stable || flags.keep > 0 ||
      !flags.plan.empty() || !flags.stats.empty() || flags.options.batch != 8) {
    throw UsageError(
        "--method cd-moe and condense take none of --batch, --stats, --plan, --progressive, "
        "--repair-drift, "
        "--until-stable, --keep",
        "they belong to methods that prune experts");
  }
  flags.condense.neurons = flags.method == "condense";
  if (flags.condense.neurons
          ? !flags.condense.alpha_calibration.empty() || flags.condense.max_experts >= 0
          : flags.width >= 0 || flags.condense.most_neurons >= 0) {
    throw UsageError(
        "--width and --neurons belong to --method condense, --alpha-calib and --max-experts to "
        "cd-moe",
        "leave out the other method's");
  }
  if (flags.condense.neurons) flags.condense.max_experts = flags.width;
  flags.condense.checkpoint_seconds = flags.options.checkpoint_seconds;
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  return ObserveCondense(session, flags.model, flags.calibration, flags.condense, flags.output);
}

int RunObserveVerb(Session& session, ObserveFlags& flags) {
  if (flags.method != "naee") return RunCondenseVerb(session, flags);
  if (!flags.condense.alpha_calibration.empty() || flags.condense.max_experts >= 0 ||
      flags.width >= 0 || flags.condense.most_neurons >= 0) {
    throw UsageError(
        "--alpha-calib, --max-experts, --width and --neurons belong to methods that "
        "condense",
        "add --method cd-moe or --method condense, or leave them out");
  }
  if (flags.progressive && flags.until_stable) {
    throw UsageError("--progressive chooses while it observes: it takes no --until-stable",
                     "leave one of them out");
  }
  if ((flags.progressive || flags.until_stable) != (flags.keep > 0)) {
    throw UsageError("--progressive or --until-stable and --keep R go together",
                     "both choose R survivors while they observe");
  }
  if (flags.repair_drift && !flags.progressive) {
    throw UsageError("--repair-drift is a target of --progressive", "add --progressive --keep R");
  }
  if (flags.until_stable && !flags.stats.empty() && flags.stats != "full") {
    throw UsageError(fmt::format("--until-stable needs --stats full, not {}", flags.stats),
                     "it chooses by the outputs of all experts");
  }
  if (flags.progressive && !flags.stats.empty() && flags.stats != "full") {
    throw UsageError(fmt::format("--progressive needs --stats full, not {}", flags.stats),
                     "it chooses by the outputs of all experts");
  }
  CommonFlags fresh = session.flags;
  // Rounds that --force was about to replace OUT with.
  fresh.force =
      fresh.force || (flags.until_stable && fresh.resume && fs::exists(flags.output + ".rounds"));
  RequireFreshOutput(flags.output, OutputKind::kFolder, fresh, flags.model);
  const Model model = Model::Open(flags.model);
  ObserveOptions& options = flags.options;
  if (!flags.stats.empty()) options.level = ParseStatsLevel(flags.stats);
  options.kept_experts = WhatIf(session, model, flags.plan);
  if (flags.until_stable) options.level = StatsLevel::kFull;
  if (flags.repair_drift) options.progressive_target = ProgressiveTarget::kRepairDrift;
  if (flags.progressive) {
    options.level = StatsLevel::kFull;
    options.progressive_keep = flags.keep;
    options.choose = [&session, &flags](const fs::path& folder, const StatsInfo& info,
                                        const StatsLayer& layer) {
      const LayerStatsReader records(folder, info, layer);
      return ChooseNaee(records, info, layer, {.keep = flags.keep}, session.pool(),
                        session.control())
          .kept;
    };
  }
  const std::vector<SourceBlocks> sources =
      LoadCalibration(session, model, flags.model, flags.calibration);
  if (flags.until_stable) return RunRounds(session, flags, model, sources);
  const ObservePlan plan = PrepareObserve(session, model, sources, options, flags.output);
  if (flags.progressive) CheckNaee(plan.info, {.keep = flags.keep});
  if (session.flags.dry_run) {
    session.PrintDryRun("observe", DescribeObserve(plan));
    return 0;
  }
  const double start = session.seconds();
  const ObserveResult result =
      RunObserve(model, sources, options, plan, flags.output, session.pool(), session.control());
  const double seconds = session.seconds() - start;
  // Of this run: layers that were there already took no time.
  const double share =
      1.0 - static_cast<double>(result.resumed_layers) / static_cast<double>(plan.info.num_layers);
  Report(session, flags, plan.info,
         {{"seconds", seconds},
          {"tera_flop", plan.tera_flop},
          {"weight_bytes_read", result.bytes_read},
          {"wait_seconds", result.wait_seconds},
          {"resumed_layers", result.resumed_layers}});
  if (!session.flags.json) {
    session.Note(
        fmt::format("wrote {}: {:.0f} tokens/s, {:.0f} GFLOP/s, waited {} for the disk",
                    flags.output, share * static_cast<double>(plan.info.num_tokens()) / seconds,
                    share * plan.tera_flop * 1000 / seconds, FormatSeconds(result.wait_seconds)));
    session.PrintUsage();
  }
  return 0;
}

}  // namespace

void AddObserve(CLI::App& app, Session& session) {
  auto flags = std::make_shared<ObserveFlags>();
  CLI::App* verb =
      app.add_subcommand("observe", "Gather statistics of the experts on your text, in one pass");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("--method", flags->method,
                   "What for: naee (pruning, skipping, scores), cd-moe (condensing layers, as\n"
                   "published) or condense (by neurons)")
      ->check(CLI::IsMember({"naee", "cd-moe", "condense"}));
  AddCalibrationFlags(*verb, flags->calibration);
  verb->add_option("--alpha-calib", flags->condense.alpha_calibration,
                   "cd-moe: text over which experts' weights are averaged (default: --calib)");
  verb->add_option("--width", flags->width,
                   "condense: most experts' worth of neurons to choose in a layer (default 6)")
      ->check(WholeNumberFrom(0));
  verb->add_option("--neurons", flags->condense.most_neurons,
                   "condense: neurons of a layer to choose among, those of most energy if it has\n"
                   "more; 0 for whole experts (default 12288)")
      ->check(CLI::Range(int64_t{0}, kNeuronsAtMost));
  verb->add_option("--max-experts", flags->condense.max_experts,
                   "cd-moe: experts to order in each layer (default 6, as published)")
      ->check(WholeNumberFrom(1));
  verb->add_option("-o,--output", flags->output, "Statistics folder to write")
      ->required()
      ->transform(OutputPath);
  verb->add_option("--stats", flags->stats, "routing, routed or full (default: full if it fits)")
      ->check(CLI::IsMember({"routing", "routed", "full"}));
  verb->add_option("-b,--batch", flags->options.batch,
                   "Sequences in a batch of the published loss (default 8)")
      ->check(WholeNumberFrom(1));
  verb->add_flag("--progressive", flags->progressive,
                 "Two streams: choose while observing (with --keep)");
  verb->add_flag("--repair-drift", flags->repair_drift,
                 "--progressive: aim at the intact stream, not at the layer's intact output");
  verb->add_flag("--until-stable", flags->until_stable,
                 "Observe in rounds of twice the text, until what NAEE keeps stays the same\n"
                 "(with --keep; at most --blocks)");
  verb->add_option("--keep", flags->keep,
                   "Experts to keep in each layer (with --progressive, --until-stable)")
      ->check(WholeNumberFrom(1));
  verb->add_option("--plan", flags->plan, "Behave as if this plan were applied");
  verb->add_option("--checkpoint-seconds", flags->options.checkpoint_seconds,
                   "Least time between saves of the stream (default 1)");
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, true);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow observe MODEL --calib prose.txt:2 --calib code.jsonl -o STATS");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunObserveVerb(session, *flags); };
  });
}

}  // namespace winnow::cli
