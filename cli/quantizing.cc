#include "quantizing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.h"
#include "base/units.h"
#include "observe/layer_stats.h"
#include "quantize/expert_errors.h"
#include "quantize/quantize_run.h"

namespace winnow::cli {
namespace {

CalibrateOptions MakeOptions(const Session& session, const QuantizingFlags& flags) {
  return {.compensated = !flags.plain,
          .compute = session.compute(),
          .memory_budget_bytes = session.memory_budget()};
}

// For every MoE layer and expert: tokens times the square of their mean routing weight, as a share
// of all tokens. All alike without statistics.
std::vector<std::vector<double>> ExpertUse(const Model& model, const std::string& stats) {
  std::vector<std::vector<double>> use;
  if (stats.empty()) {
    for (const int32_t layer : model.config().MoeLayers()) {
      use.emplace_back(
          static_cast<size_t>(model.layers()[static_cast<size_t>(layer)].experts.size()), 1.0);
    }
    return use;
  }
  const StatsInfo info = ReadStatsInfo(stats);
  if (info.model_fingerprint != model.checkpoint().FingerprintHex()) {
    throw UsageError(fmt::format("{}: the statistics are of another model", stats),
                     "gather them with winnow observe on this model");
  }
  std::map<int32_t, const StatsLayer*> layers;
  for (const StatsLayer& layer : info.layers) layers[layer.layer] = &layer;
  for (const int32_t index : model.config().MoeLayers()) {
    const auto layer = layers.find(index);
    if (layer == layers.end() || !layer->second->as_if_kept.empty()) {
      throw UsageError(
          fmt::format("{}: there are no statistics of layer {} as it is", stats, index),
          "gather them with winnow observe, without a plan");
    }
    const LayerStatsReader reader(stats, info, *layer->second);
    const std::vector<int64_t> tokens = reader.Coverage();
    std::vector<double> weight(tokens.size(), 0.0);
    for (size_t s = 0; s < info.sources.size(); ++s) {
      const TensorInfo* sums = reader.file().Find(fmt::format("sums.{}.weight", s));
      std::vector<double> source(tokens.size());
      reader.file().Read(*sums, std::as_writable_bytes(std::span(source)));
      for (size_t e = 0; e < weight.size(); ++e) weight[e] += source[e];
    }
    for (size_t e = 0; e < weight.size(); ++e) {
      // An expert no token used counts as if one had, with the weight of chance.
      const double seen = std::max(static_cast<double>(tokens[e]), 1.0);
      const double sum = std::max(weight[e], 1.0 / static_cast<double>(tokens.size()));
      weight[e] = sum * sum / seen / static_cast<double>(std::max<int64_t>(info.num_tokens(), 1));
    }
    use.push_back(std::move(weight));
  }
  return use;
}

// Errors as if every expert were alike: for a plan of the right size before anything is measured.
std::vector<LayerErrors> AlikeErrors(const Model& model,
                                     const std::vector<PackedFormat>& candidates) {
  std::vector<LayerErrors> all;
  for (const int32_t layer : model.config().MoeLayers()) {
    std::vector<double> errors;
    for (const PackedFormat& format : candidates) errors.push_back(std::pow(0.25, format.bits));
    const size_t experts = model.layers()[static_cast<size_t>(layer)].experts.size();
    all.push_back({layer, std::vector<std::vector<double>>(experts, errors)});
  }
  return all;
}

}  // namespace

std::optional<PackedFormat> FormatFromFlag(const std::string& text) {
  const std::optional<PackedFormat> format = PackedFormatFromName(text);
  if (!format || format->grid != PackedGrid::kSymmetric) return format;
  return BestFormat(format->bits, format->group_columns);
}

std::vector<PackedFormat> ExpertCandidates(const PackedFormat& base) {
  std::vector<PackedFormat> candidates;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    PackedFormat format = base;
    format.bits = bits;
    if (HasLevels(format) && bits > 4) {
      if (format.grid != PackedGrid::kCurved) continue;
      format.grid = PackedGrid::kShifted;
    }
    candidates.push_back(format);
  }
  return candidates;
}

std::vector<std::pair<std::string, int64_t>> CountFormats(const QuantizePlan& plan) {
  std::map<std::pair<int, std::string>, int64_t> counts;
  for (const LayerFormats& layer : plan.layers) {
    for (const PackedFormat& format : layer.experts) {
      if (!format.empty()) ++counts[{format.bits, PackedFormatName(format)}];
    }
  }
  std::vector<std::pair<std::string, int64_t>> ordered;
  for (const auto& [format, count] : counts) ordered.emplace_back(format.second, count);
  return ordered;
}

void AddQuantizingFlags(CLI::App& verb, QuantizingFlags& flags) {
  AddCalibrationFlags(verb, flags.calibration, false);
  verb.add_flag("--plain", flags.plain,
                "With --calib: round each weight by itself, heavier for larger inputs, instead\n"
                "of making up for errors in the columns after it");
  verb.add_option("--size", flags.size,
                  "Choose bits for each expert so that all weight files take this much, e.g. 5G;\n"
                  "by errors measured on --calib, else by those of the weights");
  verb.add_option("--stats", flags.stats,
                  "Statistics folder of winnow observe; used for --size without --calib: an\n"
                  "expert's error counts as much as the model uses it");
}

QuantizePlan PlanForSize(Session& session, const Model& model, const QuantizePlan& plan,
                         const PackedFormat& base, const QuantizingFlags& flags,
                         const std::string& output, Quantizing& quantizing) {
  const std::vector<PackedFormat> candidates = ExpertCandidates(base);
  const uint64_t size = ParseBytes(flags.size, "--size");
  const QuantizePlan alike =
      AllocateToSize(model, plan, candidates, AlikeErrors(model, candidates), size, nullptr);
  if (session.flags.dry_run) return alike;
  std::vector<LayerErrors> errors;
  std::string how;
  if (!quantizing.sources.empty()) {
    const CalibrateOptions options = MakeOptions(session, flags);
    const CalibratePlan measure =
        PlanCalibrate(model, quantizing.sources, alike, options, session.pool().num_threads());
    session.RequireMemory(measure.memory, "measure");
    errors = MeasureExpertErrors(model, candidates, options, measure, output + ".spill",
                                 session.pool(), session.control());
    how = "measured on the calibration text";
  } else {
    errors = WeightErrors(model, candidates, ExpertUse(model, flags.stats), session.pool(),
                          session.control());
    how = flags.stats.empty() ? "of the weights" : "of the weights by use";
  }
  session.FinishProgress();
  Allocation allocation;
  QuantizePlan result = AllocateToSize(model, plan, candidates, errors, size, &allocation);
  const PackedFormat& uniform = candidates[static_cast<size_t>(allocation.uniform_choice)];
  const double share =
      allocation.uniform_error > 0 ? allocation.error / allocation.uniform_error : 1;
  const std::string summary =
      fmt::format("bits of each expert by errors {}: {:.3g} of the error of {} throughout", how,
                  share, PackedFormatName(uniform));
  session.Note(summary);
  std::string bits = "  bits of experts:";
  for (const auto& [format, count] : CountFormats(result)) {
    bits += fmt::format("  {} x {}", count, format);
  }
  session.Note(bits);
  quantizing.method += summary + "; ";
  quantizing.json["size"] = size;
  quantizing.json["error_of_uniform"] = share;
  quantizing.json["uniform"] = PackedFormatName(uniform);
  return result;
}

std::optional<PackedWriteResult> QuantizeCalibrated(Session& session, const Model& model,
                                                    const QuantizePlan& plan,
                                                    const QuantizingFlags& flags,
                                                    const std::string& output,
                                                    Quantizing& quantizing) {
  const CalibrateOptions options = MakeOptions(session, flags);
  const CalibratePlan calibrate =
      PlanCalibrate(model, quantizing.sources, plan, options, session.pool().num_threads());
  session.RequireMemory(calibrate.memory, "quantize");
  if (session.flags.dry_run) return std::nullopt;
  const std::string tokens = FormatCount(static_cast<uint64_t>(calibrate.tokens.num_tokens()));
  session.Note(fmt::format("quantize: {} on {} tokens; {} of memory",
                           flags.plain ? "rounding weighted by the inputs" : "compensated rounding",
                           tokens, FormatBytes(calibrate.memory.total_bytes())));
  PackedCheckpointWriter writer(model, plan, output);
  const std::vector<CalibratedLayer> layers =
      RunCalibrate(model, plan, options, calibrate, output + ".spill", writer, session.pool(),
                   session.control());
  session.FinishProgress();
  int64_t unseen = 0;
  OrderedJson table = OrderedJson::array();
  for (const CalibratedLayer& layer : layers) {
    unseen += layer.unseen_experts;
    table.push_back({{"layer", layer.layer},
                     {"unseen_experts", layer.unseen_experts},
                     {"fewest_tokens", layer.fewest_tokens}});
  }
  if (unseen > 0) {
    session.Note(fmt::format(
        "{} experts saw no token of the text and are rounded for the mean of their layer", unseen));
  }
  quantizing.json["calibration_tokens"] = calibrate.tokens.num_tokens();
  quantizing.json["layers"] = table;
  quantizing.method += flags.plain
                           ? fmt::format(
                                 "each weight to the nearest value of its group's grid, scales "
                                 "weighted by the inputs of {} tokens",
                                 tokens)
                           : fmt::format(
                                 "column by column, each error made up for by the columns after it "
                                 "(GPTQ), with the inputs of {} tokens",
                                 tokens);
  OrderedJson record = QuantizeRecord(model, plan, quantizing.method);
  record["calibration"] = quantizing.json;
  return writer.Finish(QuantizeCard(model, plan, quantizing.method), record, session.control());
}

}  // namespace winnow::cli
