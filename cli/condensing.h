// CD-MoE as steps of observe and plan: the expert search, and which layers to condense.
#pragma once

#include <string>
#include <vector>

#include "calibration.h"
#include "condense/condense_run.h"
#include "plan/compression_plan.h"
#include "session.h"

namespace winnow::cli {

struct CondenseFlags {
  std::vector<std::string> alpha_calibration;  // --alpha-calib
  int64_t max_experts = 0;                     // --max-experts; 0: as published
  double checkpoint_seconds = 1;
};
// observe --method cd-moe.
int ObserveCondense(Session& session, const std::string& model_folder,
                    const CalibrationFlags& calibration, const CondenseFlags& flags,
                    const std::string& output);

struct CondenseChoice {
  std::string model;                // --model
  int64_t experts = -1;             // --experts: kept beside the shared expert, of each layer
  int64_t layers = 0;               // --layers: how many, found by search
  std::vector<int32_t> moe_layers;  // --moe-layers: these, without a search
  bool kl = false;                  // --layer-order kl instead of the published greedy search
  std::string spill_folder;
};
// plan --method cd-moe.
CompressionPlan MakeCondensingPlan(Session& session, const fs::path& stats,
                                   const CondenseChoice& choice, const std::string& target);

}  // namespace winnow::cli
