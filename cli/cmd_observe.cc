// winnow observe: one pass over calibration text, gathers statistics.
#include <fmt/format.h>

#include "base/error.h"
#include "base/units.h"
#include "calibration.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct ObserveFlags {
  std::string model, output, stats, plan;
  CalibrationFlags calibration;
  ObserveOptions options;
  bool progressive = false;
  int64_t keep = 0;
};

int RunObserveVerb(Session& session, ObserveFlags& flags) {
  if (flags.progressive != (flags.keep > 0)) {
    throw UsageError("--progressive and --keep R go together",
                     "progressive pruning chooses R survivors while it observes");
  }
  if (flags.progressive && !flags.stats.empty() && flags.stats != "full") {
    throw UsageError(fmt::format("--progressive needs --stats full, not {}", flags.stats),
                     "it chooses by the outputs of all experts");
  }
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  const Model model = Model::Open(flags.model);
  ObserveOptions& options = flags.options;
  if (!flags.stats.empty()) options.level = ParseStatsLevel(flags.stats);
  options.kept_experts = WhatIf(session, model, flags.plan);
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
  const ObservePlan plan = PrepareObserve(session, model, sources, options, flags.output);
  if (flags.progressive) CheckNaee(plan.info, {.keep = flags.keep});
  if (session.flags.dry_run) {
    session.PrintDryRun("observe", DescribeObserve(plan));
    return 0;
  }
  const double start = session.seconds();
  const ObserveResult result =
      RunObserve(model, sources, options, plan, flags.output, session.pool(), session.control());
  const OrderedJson coverage = ReportCoverage(session, flags.output, plan.info);
  const double seconds = session.seconds() - start;
  // Of this run: layers that were there already took no time.
  const double share =
      1.0 - static_cast<double>(result.resumed_layers) / static_cast<double>(plan.info.num_layers);
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.observe/1"},
                       {"output", flags.output},
                       {"level", StatsLevelName(plan.info.level)},
                       {"tokens", plan.info.num_tokens()},
                       {"coverage", coverage},
                       {"seconds", seconds},
                       {"tera_flop", plan.tera_flop},
                       {"weight_bytes_read", result.bytes_read},
                       {"bytes_read", BytesReadByProcess()},
                       {"wait_seconds", result.wait_seconds},
                       {"resumed_layers", result.resumed_layers},
                       {"peak_rss_bytes", PeakResidentBytes()}});
  } else {
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
  AddCalibrationFlags(*verb, flags->calibration);
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
  verb->add_option("--keep", flags->keep, "Experts to keep in each layer (with --progressive)")
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
