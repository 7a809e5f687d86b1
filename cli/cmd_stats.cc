// winnow stats merge: joins statistics gathered apart.
#include <fmt/format.h>

#include "base/error.h"
#include "base/units.h"
#include "observe/layer_stats.h"
#include "observe/stats_merge.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct StatsFlags {
  std::vector<std::string> inputs;
  std::string output;
};

int RunMerge(Session& session, const StatsFlags& flags) {
  if (flags.inputs.size() < 2) throw UsageError("stats merge needs two or more statistics folders");
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags);
  std::vector<fs::path> parts(flags.inputs.begin(), flags.inputs.end());
  std::vector<StatsInfo> infos;
  for (const fs::path& part : parts) infos.push_back(ReadStatsInfo(part));
  const StatsInfo merged = MergedInfo(infos);
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("copy buffer", kMergeBufferBytes);
  memory.Add("lists of tensors", MergeListBytes(infos));
  session.RequireMemory(memory, "stats merge");
  if (session.flags.dry_run) {
    session.PrintDryRun("stats merge",
                        {{"tokens", merged.num_tokens()}, {"bytes_to_write", StatsBytes(merged)}});
    return 0;
  }
  MergeStats(parts, flags.output, session.control());
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.stats-merge/1"},
                       {"output", flags.output},
                       {"tokens", merged.num_tokens()},
                       {"sources", merged.sources.size()}});
  } else {
    session.Note(fmt::format("{} tokens of {} sources in {}",
                             FormatCount(static_cast<uint64_t>(merged.num_tokens())),
                             merged.sources.size(), flags.output));
  }
  return 0;
}

}  // namespace

void AddStats(CLI::App& app, Session& session) {
  auto flags = std::make_shared<StatsFlags>();
  CLI::App* verb = app.add_subcommand("stats", "Work with statistics folders");
  verb->require_subcommand(1);
  CLI::App* merge = verb->add_subcommand("merge", "Join statistics of different texts");
  merge->set_help_flag("-h,--help", "Help");
  merge->add_option("STATS", flags->inputs, "Statistics folders")->required();
  merge->add_option("-o,--output", flags->output, "Statistics folder to write")
      ->required()
      ->transform(OutputPath);
  session.AddOutputFlags(*merge, false);
  session.AddMemoryFlag(*merge);
  session.AddReportFlags(*merge);
  merge->footer("Example: winnow stats merge PROSE CODE -o BOTH");
  merge->callback([&session, flags] {
    session.action = [&session, flags] { return RunMerge(session, *flags); };
  });
}

}  // namespace winnow::cli
