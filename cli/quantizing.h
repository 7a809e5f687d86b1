// What `winnow quantize` does with text, statistics and a size: bits for each expert, and the
// calibrated sweep.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "calibration.h"              // CalibrationFlags
#include "quantize/calibrated_run.h"  // CalibratePlan
#include "session.h"                  // Session

namespace winnow::cli {

struct QuantizingFlags {
  CalibrationFlags calibration;
  std::string stats, size;
  bool plain = false;
};

void AddQuantizingFlags(CLI::App& verb, QuantizingFlags& flags);

// What one run knows besides its formats.
struct Quantizing {
  std::vector<SourceBlocks> sources;  // empty: no text
  std::string method;                 // for the card
  OrderedJson json = OrderedJson::object();
};

// A packed format by name; bits alone (4bit) leave the grid to us: the one that loses least.
std::optional<PackedFormat> FormatFromFlag(const std::string& text);

// The formats an expert may get: 2 to 8 bits, otherwise as `base`, but shifted where a curved grid
// has no such bits.
std::vector<PackedFormat> ExpertCandidates(const PackedFormat& base);
// How many experts have which packed format, from few bits to many.
std::vector<std::pair<std::string, int64_t>> CountFormats(const QuantizePlan& plan);

// The plan with bits for each expert so that all files take --size; `base` has the grid and group
// that all candidates share. Measures on the sources, or else by weights and --stats.
QuantizePlan PlanForSize(Session& session, const Model& model, const QuantizePlan& plan,
                         const PackedFormat& base, const QuantizingFlags& flags,
                         const std::string& output, Quantizing& quantizing);

// The calibrated sweep and what it writes. With --dry-run only the memory plan.
std::optional<PackedWriteResult> QuantizeCalibrated(Session& session, const Model& model,
                                                    const QuantizePlan& plan,
                                                    const QuantizingFlags& flags,
                                                    const std::string& output,
                                                    Quantizing& quantizing);

}  // namespace winnow::cli
