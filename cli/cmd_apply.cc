// winnow apply: writes the checkpoint a plan describes.
#include <fmt/format.h>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "base/units.h"
#include "plan/compression_plan.h"
#include "plan/loader_target.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct ApplyFlags {
  std::string model, plan, output, dtype;
};

int RunApply(Session& session, const ApplyFlags& flags) {
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  const CompressionPlan plan = ReadPlan(flags.plan);
  if (!plan.target.empty()) CheckTarget(plan, plan.target);
  const Model model = Model::Open(flags.model);
  ApplyOptions options;
  options.resume = session.flags.resume;
  if (flags.dtype == "f32") options.dtype = Dtype::kF32;
  if (flags.dtype == "bf16") options.dtype = Dtype::kBF16;
  if (flags.dtype == "f16") options.dtype = Dtype::kF16;
  const RewritePlan rewrite = PlanRewrite(model, plan, options);
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("names and places of tensors", model.checkpoint().tensors().size() * 1024);
  memory.Add("copy buffer", uint64_t{16} << 20);
  session.RequireMemory(memory, "apply");
  session.Note(fmt::format("apply: {} -> {} experts, {} -> {}", rewrite.experts_before,
                           rewrite.experts_after, FormatBytes(rewrite.bytes_before),
                           FormatBytes(rewrite.bytes_after)));
  if (session.flags.dry_run) {
    session.PrintDryRun("apply", {{"bytes_to_read", rewrite.bytes_after},
                                  {"bytes_to_write", rewrite.bytes_after},
                                  {"bytes_before", rewrite.bytes_before}});
    return 0;
  }
  const ApplyResult result =
      ApplyPlan(model, plan, rewrite, options, flags.output, session.control());
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.apply/1"},
                       {"output", flags.output},
                       {"bytes_before", rewrite.bytes_before},
                       {"bytes_after", rewrite.bytes_after},
                       {"bytes_written", result.bytes_written},
                       {"seconds", result.seconds},
                       {"audited_tensors", result.audited_tensors},
                       {"peak_rss_bytes", PeakResidentBytes()}});
  } else {
    session.Note(
        fmt::format("wrote {} at {}/s; audited {} tensors", flags.output,
                    FormatBytes(static_cast<uint64_t>(static_cast<double>(result.bytes_written) /
                                                      std::max(result.seconds, 1e-3))),
                    result.audited_tensors));
    session.PrintUsage();
  }
  return 0;
}

}  // namespace

void AddApply(CLI::App& app, Session& session) {
  auto flags = std::make_shared<ApplyFlags>();
  CLI::App* verb = app.add_subcommand("apply", "Write the smaller checkpoint a plan describes");
  verb->add_option("MODEL", flags->model, "Checkpoint folder the plan was made for")->required();
  verb->add_option("--plan", flags->plan, "plan.json")->required();
  verb->add_option("-o,--output", flags->output, "Checkpoint folder to write")
      ->required()
      ->transform(OutputPath);
  verb->add_option("--dtype", flags->dtype,
                   "Convert the weights: f32, bf16 or f16 (default: as they are)")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, true);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow apply MODEL --plan plan.json -o SMALLER");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunApply(session, *flags); };
  });
}

}  // namespace winnow::cli
