// Healing as a step of apply and compress.
#pragma once

#include <string>
#include <vector>

#include "apply/weight_replacements.h"  // WeightReplacements
#include "heal/heal_run.h"              // HealResult
#include "model/model.h"                // Model
#include "plan/compression_plan.h"      // CompressionPlan
#include "session.h"                    // Session
#include "text/block_builder.h"         // SourceBlocks

namespace winnow::cli {

struct Healing {
  HealResult result;
  WeightReplacements weights;  // empty if healing did not help
  // Of condensed layers, by decoder layer.
  std::map<int32_t, std::shared_ptr<const SafetensorsFile>> condensed;
  std::string card;  // a section of the model card
  OrderedJson json;
};

// What healing will hold and write, to the notes and to --dry-run; refuses what does not fit.
HealPlan PrepareHeal(Session& session, const Model& model, const CompressionPlan& plan,
                     const std::vector<SourceBlocks>& sources);
// Heals into `folder`, which must stay until the weights are written. Prints the gain of each layer
// and in all.
Healing Heal(Session& session, const Model& model, const CompressionPlan& plan,
             const HealPlan& heal, const fs::path& folder);

}  // namespace winnow::cli
