// CD-MoE as steps of observe and plan: the expert search, and which layers to condense.
#pragma once

#include <string>
#include <vector>

#include "calibration.h"
#include "condense/condense_run.h"
#include "condense/layer_search.h"
#include "plan/compression_plan.h"
#include "session.h"

namespace winnow::cli {

struct CondenseFlags {
  bool neurons = false;                        // --method condense
  std::vector<std::string> alpha_calibration;  // --alpha-calib
  int64_t max_experts = -1;                    // --max-experts, --width; -1: as published
  int64_t most_neurons = -1;                   // --neurons; -1: kMostNeurons
  double checkpoint_seconds = 1;
};
// observe --method cd-moe or condense.
int ObserveCondense(Session& session, const std::string& model_folder,
                    const CalibrationFlags& calibration, const CondenseFlags& flags,
                    const std::string& output);

// What a layer becomes with so many experts, or experts' worth of neurons, as a plan says it.
CondensePlanOfLayer CondensedOf(const CondenseStats& stats, const CondenseLayer& layer,
                                int64_t experts, const ModelConfig& config);

// The weights of a layer as that plan would leave it.
CondensedWeights CondensedWeightsOf(CondensePlanOfLayer condensed, int32_t layer,
                                    const LayerWeights& intact, const Model& model);

struct CondenseChoice {
  std::string model;                // --model
  int64_t experts = -1;             // --experts or --width: kept beside the shared expert
  int64_t layers = 0;               // --layers: how many, found by search
  std::vector<int32_t> moe_layers;  // --moe-layers: these, without a search
  bool kl = false;                  // --layer-order kl instead of the published greedy search
  std::string spill_folder;
};
// plan --method cd-moe or condense: as the statistics are.
CompressionPlan MakeCondensingPlan(Session& session, const fs::path& stats,
                                   const CondenseChoice& choice, const std::string& target);

}  // namespace winnow::cli
