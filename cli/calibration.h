// Flags and loading of calibration text, shared by observe and compress.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "model/model.h"         // Model
#include "session.h"             // Session
#include "text/block_builder.h"  // SourceBlocks, BlockOptions

namespace winnow::cli {

struct CalibrationFlags {
  std::vector<std::string> sources;
  BlockOptions blocks;
};

void AddCalibrationFlags(CLI::App& verb, CalibrationFlags& flags, bool required = true);
// Reads, tokenises and cuts; warns about ids beyond the vocabulary and blocks beyond the context.
std::vector<SourceBlocks> LoadCalibration(const Session& session, const Model& model,
                                          const std::string& model_folder,
                                          const CalibrationFlags& flags);

}  // namespace winnow::cli
