// plan --method mix: under one budget some layers keep their router and lose experts (NAEE), others
// are condensed to neurons of all experts, whichever leaves less error of the stream for its bytes.
#pragma once

#include <string>

#include "condense/condense_stats.h"
#include "plan/compression_plan.h"
#include "planning.h"
#include "session.h"

namespace winnow::cli {

struct MixChoice {
  std::string neuron_stats;  // --with: of observe --method condense
  std::string model;         // --model
  int64_t total = 0;         // --total: experts' worth left over all layers
  std::string size;          // --size, in place of it
  std::string spill_folder;
};
// `stats` are full statistics of the same model. With `calibration` several divisions are healed,
// in `work`, and the best on sequences that no fit has seen is taken.
CompressionPlan MakeMixedPlan(Session& session, const fs::path& stats, const StatsInfo& info,
                              const MixChoice& choice, const std::vector<SourceBlocks>& calibration,
                              const fs::path& work);

}  // namespace winnow::cli
