// winnow apply: writes the checkpoint a plan describes.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <optional>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "base/units.h"
#include "calibration.h"
#include "healing.h"
#include "plan/compression_plan.h"
#include "plan/loader_target.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct ApplyFlags {
  std::string model, plan, output, dtype;
  bool heal = false, fuse = false, stock = false, export_code = false;
  CalibrationFlags calibration;
};

// Healed weights until they are written: OUT.heal, which another program's folder must not be.
fs::path HealFolder(const Session& session, const ApplyFlags& flags) {
  const fs::path folder = flags.output + ".heal";
  if (!fs::exists(folder) || session.flags.resume) return folder;
  if (!session.flags.force) {
    throw UsageError(fmt::format("{} is left from an interrupted run", folder.string()),
                     "go on with --resume, or start again with --force");
  }
  if (!fs::is_empty(folder) && !fs::exists(folder / "heal.json")) {
    throw UsageError(
        fmt::format("{} was not written by winnow, so --force leaves it alone", folder.string()),
        "choose another name with -o, or remove it yourself");
  }
  return folder;
}

int RunApply(Session& session, const ApplyFlags& flags) {
  if (flags.heal == flags.calibration.sources.empty()) {
    throw UsageError("--heal and --calib TEXT go together",
                     "healing fits the survivors on text, best that of the plan");
  }
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  const CompressionPlan plan = ReadPlan(flags.plan);
  if (!plan.target.empty()) CheckTarget(plan, plan.target);
  const Model model = Model::Open(flags.model);
  ApplyOptions options;
  options.resume = session.flags.resume;
  options.export_code = flags.export_code;
  if (flags.fuse) options.condensed_form = CondensedForm::kFused;
  if (flags.stock) options.condensed_form = CondensedForm::kStock;
  if ((flags.fuse || flags.stock) && !plan.condenses()) {
    throw UsageError("--fuse and --stock are for plans that condense layers; this one does not",
                     "leave it out");
  }
  if (flags.dtype == "f32") options.dtype = Dtype::kF32;
  if (flags.dtype == "bf16") options.dtype = Dtype::kBF16;
  if (flags.dtype == "f16") options.dtype = Dtype::kF16;
  RewritePlan rewrite = PlanRewrite(model, plan, options);
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("names and places of tensors", model.checkpoint().tensors().size() * 1024);
  memory.Add("copy buffer", uint64_t{16} << 20);
  if (rewrite.largest_built_bytes > 0) {
    memory.Add("parts of a condensed layer", rewrite.largest_build_source_bytes);
    // In the source's format, with another down projection, and in the format that is written.
    memory.Add("a condensed layer", 3 * rewrite.largest_built_bytes);
  }
  session.RequireMemory(memory, "apply");
  session.Note(fmt::format("apply: {} -> {} experts, {} -> {}", rewrite.experts_before,
                           rewrite.experts_after, FormatBytes(rewrite.bytes_before),
                           FormatBytes(rewrite.bytes_after)));
  if (!rewrite.condensed_layers.empty()) {
    session.Note(fmt::format("apply: layers without a router from now on: {}",
                             fmt::join(rewrite.condensed_layers, ", ")));
  }
  std::optional<HealPlan> heal;
  fs::path heal_folder;
  if (flags.heal) {
    heal_folder = HealFolder(session, flags);
    heal = PrepareHeal(session, model, plan,
                       LoadCalibration(session, model, flags.model, flags.calibration));
  }
  if (session.flags.dry_run) {
    session.PrintDryRun("apply", {{"bytes_to_read", rewrite.bytes_after},
                                  {"bytes_to_write", rewrite.bytes_after},
                                  {"bytes_before", rewrite.bytes_before}});
    return 0;
  }
  Healing healing;
  if (heal) {
    healing = Heal(session, model, plan, *heal, heal_folder);
    options.replacements = &healing.weights;
    options.refitted_layers = healing.condensed;
    options.changes = healing.card;
    rewrite = PlanRewrite(model, plan, options);
  }
  const ApplyResult result =
      ApplyPlan(model, plan, rewrite, options, flags.output, session.control());
  if (heal) fs::remove_all(heal_folder);
  if (session.flags.json) {
    OrderedJson json = {{"schema", "winnow.apply/1"},
                        {"output", flags.output},
                        {"bytes_before", rewrite.bytes_before},
                        {"bytes_after", rewrite.bytes_after},
                        {"bytes_written", result.bytes_written},
                        {"seconds", result.seconds},
                        {"audited_tensors", result.audited_tensors},
                        {"peak_rss_bytes", PeakResidentBytes()}};
    if (heal) json["healing"] = healing.json;
    session.PrintJson(json);
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
  flags->calibration.blocks.blocks_per_document = 1;
  CLI::App* verb = app.add_subcommand("apply", "Write the smaller checkpoint a plan describes");
  verb->add_option("MODEL", flags->model, "Checkpoint folder the plan was made for")->required();
  verb->add_option("--plan", flags->plan, "plan.json")->required();
  verb->add_option("-o,--output", flags->output, "Checkpoint folder to write")
      ->required()
      ->transform(OutputPath);
  verb->add_option("--dtype", flags->dtype,
                   "Convert the weights: f32, bf16 or f16 (default: as they are)")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  CLI::Option* fuse = verb->add_flag("--fuse", flags->fuse,
                                     "Condensed layers as one dense SwiGLU each, not in parts");
  verb->add_flag("--stock", flags->stock,
                 "Condensed layers as the family's own dense layers, where its config can say so")
      ->excludes(fuse);
  verb->add_flag("--export-code", flags->export_code,
                 "Add modeling_winnow.py, with which transformers loads what it does not know\n"
                 "(trust_remote_code)");
  verb->add_flag("--heal", flags->heal,
                 "Refit the survivors' down projections on the text of --calib");
  AddCalibrationFlags(*verb, flags->calibration, false);
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, true);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow apply MODEL --plan plan.json -o SMALLER");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunApply(session, *flags); };
  });
}

}  // namespace winnow::cli
