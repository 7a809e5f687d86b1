// winnow quantize: stores weights in a few bits each.
#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "base/error.h"
#include "base/units.h"
#include "model/weight_parts.h"
#include "quantize/quantize_run.h"
#include "quantizing.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct QuantizeFlags {
  std::string model, output;
  std::string experts = "stored", rest = "stored";
  std::string grid;
  bool asymmetric = false;
  int64_t group = 0;  // 0: not given
  QuantizingFlags quantizing;
};

constexpr const char* kKnownFormats =
    "8bit, 6bit, 4bit, 3bit, 2bit, with -curve, -shift, -asym or -log and -g64 or -g128 behind it, "
    "or stored";

// Nothing: the matrices stay as they are, which "stored" and the name of their dtype both say.
PackedFormat ParseFormat(const std::string& flag, const std::string& text, const Model& model) {
  if (text == "stored") return {};
  std::string upper = text;
  std::transform(upper.begin(), upper.end(), upper.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  if (const auto dtype = DtypeFromName(upper); dtype && IsComputeDtype(*dtype)) {
    const Dtype stored = model.layers().front().input_norm.tensor->dtype;
    if (*dtype == stored) return {};
    throw UsageError(fmt::format("{} {}: the model is stored in {}", flag, text, DtypeName(stored)),
                     "convert it first: winnow apply --dtype; or leave it `stored`");
  }
  if (const auto format = FormatFromFlag(text)) return *format;
  throw UsageError(fmt::format("{} {}: no format of that name", flag, text), kKnownFormats);
}

// --grid, --asymmetric and --group complete a name that is of bits alone.
PackedFormat ExpertFormat(const QuantizeFlags& flags, const Model& model) {
  PackedFormat format = ParseFormat("--experts", flags.experts, model);
  if (!flags.quantizing.size.empty()) {
    if (!format.empty()) {
      throw UsageError("--size chooses the bits of each expert: --experts does not go with it",
                       "give one of the two; --grid, --asymmetric and --group go with --size");
    }
    format = BestFormat(4);
  }
  const bool any = !flags.grid.empty() || flags.asymmetric || flags.group != 0;
  if (!any) return format;
  if (format.empty() || format != BestFormat(format.bits)) {
    throw UsageError(
        fmt::format("--grid, --asymmetric and --group do not go with --experts {}", flags.experts),
        "give the bits alone, --experts 4bit, or all in its name, --experts 4bit-asym-g64");
  }
  if (flags.asymmetric && !flags.grid.empty() && flags.grid != "linear") {
    throw UsageError(
        fmt::format("--grid {} has no minimum: --asymmetric does not go with it", flags.grid),
        "leave out one");
  }
  if (flags.grid == "linear") format.grid = PackedGrid::kSymmetric;
  if (flags.grid == "shift") format.grid = PackedGrid::kShifted;
  if (flags.asymmetric) format.grid = PackedGrid::kAsymmetric;
  if (flags.grid == "log") format.grid = PackedGrid::kLogarithmic;
  if (flags.grid == "curve") format.grid = PackedGrid::kCurved;
  if (flags.group != 0) format.group_columns = flags.group;
  if (!PackedFormatFromName(PackedFormatName(format))) {
    throw UsageError(fmt::format("there is no {} grid of {} bits", flags.grid, format.bits),
                     "--grid log and curve take 2, 3 or 4 bits");
  }
  return format;
}

std::string Summary(const QuantizeEstimate& estimate) {
  return fmt::format("quantize: {} weights, tensors {} -> {} ({:.0f} %)",
                     FormatCount(estimate.weights), FormatBytes(estimate.bytes_before),
                     FormatBytes(estimate.bytes_after),
                     100.0 * static_cast<double>(estimate.bytes_after) /
                         static_cast<double>(std::max<uint64_t>(estimate.bytes_before, 1)));
}

int RunQuantizeVerb(Session& session, const QuantizeFlags& flags) {
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model,
                     /*resumable=*/false);
  const Model model = Model::Open(flags.model);
  QuantizePlan plan = UniformQuantizePlan(model, ExpertFormat(flags, model),
                                          ParseFormat("--rest", flags.rest, model));
  Quantizing quantizing;
  if (!flags.quantizing.calibration.sources.empty()) {
    quantizing.sources = LoadCalibration(session, model, flags.model, flags.quantizing.calibration);
  }
  if (!flags.quantizing.size.empty()) {
    plan = PlanForSize(session, model, plan, ExpertFormat(flags, model), flags.quantizing,
                       flags.output, quantizing);
  }
  const QuantizeEstimate estimate = EstimateQuantize(model, plan);
  if (quantizing.sources.empty()) {
    session.RequireMemory(estimate.memory, "quantize");
  } else if (session.flags.dry_run) {
    QuantizeCalibrated(session, model, plan, flags.quantizing, flags.output, quantizing);
  }
  session.Note(Summary(estimate));
  if (session.flags.dry_run) {
    for (const WeightPart& part : WeightParts(model, plan.layers, plan.lm_head)) {
      session.Note(fmt::format("  {:<14} {:<10} {:>6.2f} bits per weight  {:>9}", part.part,
                               part.format, part.bits_per_weight(), FormatBytes(part.bytes)));
    }
    session.PrintDryRun("quantize", {{"bytes_to_read", estimate.bytes_before},
                                     {"bytes_to_write", estimate.bytes_after},
                                     {"bytes_before", estimate.bytes_before},
                                     {"bytes_after", estimate.bytes_after},
                                     {"weights", estimate.weights}});
    return 0;
  }
  const PackedWriteResult result =
      quantizing.sources.empty()
          ? RunQuantize(model, plan, flags.output, session.pool(), session.control())
          : *QuantizeCalibrated(session, model, plan, flags.quantizing, flags.output, quantizing);
  session.FinishProgress();
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.quantize/1"},
                       {"output", flags.output},
                       {"bytes_before", estimate.bytes_before},
                       {"bytes_after", estimate.bytes_after},
                       {"bytes_written", result.bytes_written},
                       {"weights", estimate.weights},
                       {"audited_tensors", result.audited_tensors},
                       {"seconds", session.seconds()},
                       {"peak_rss_bytes", PeakResidentBytes()}});
  } else {
    session.Note(fmt::format("wrote {}, {}; audited {} tensors", flags.output,
                             FormatBytes(result.bytes_written), result.audited_tensors));
    session.PrintUsage();
  }
  return 0;
}

}  // namespace

void AddQuantize(CLI::App& app, Session& session) {
  auto flags = std::make_shared<QuantizeFlags>();
  CLI::App* verb = app.add_subcommand("quantize", "Store weights in 2 to 8 bits each");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("--experts", flags->experts,
                   "Format of the experts: 8bit, 4bit, 3bit, 2bit, 4bit-asym-g64, ...\n"
                   "(default: as stored)");
  verb->add_option("--rest", flags->rest,
                   "Format of attention, shared expert, dense layers and lm_head, e.g. 8bit\n"
                   "(default: as stored)");
  verb->add_option("--grid", flags->grid,
                   "Values of the experts' codes: linear; shift, which each group moves; curve, "
                   "denser around\n"
                   "zero and moved, and log, powers of two, of 2 to 4 bits (default: curve, above "
                   "4 bits shift)")
      ->check(CLI::IsMember({"linear", "shift", "curve", "log"}));
  verb->add_flag("--asymmetric", flags->asymmetric,
                 "The experts' groups have a minimum besides their scale");
  verb->add_option("--group", flags->group,
                   "Columns of the experts that share a scale: 32 (default), 64 or 128")
      ->check(CLI::IsMember({32, 64, 128}));
  AddQuantizingFlags(*verb, flags->quantizing);
  verb->add_option("-o,--output", flags->output, "Checkpoint folder to write")
      ->required()
      ->transform(OutputPath);
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, false);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow quantize MODEL --experts 4bit --rest 8bit -o SMALLER");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunQuantizeVerb(session, *flags); };
  });
}

}  // namespace winnow::cli
