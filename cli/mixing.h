// plan --method mix: under one budget some layers keep their router and lose experts (NAEE), others
// are condensed to neurons of all experts, whichever leaves less error of the stream for its bytes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "condense/condense_stats.h"
#include "methods/naee_search.h"
#include "plan/compression_plan.h"
#include "planning.h"
#include "session.h"

namespace winnow::cli {

// What healing leaves of a pruned layer's squared error: 0.43 to 0.53 on sample-deepseek, where the
// nll of healed models was compared with the errors planned (docs/METHODS.md). A condensed layer's
// error is after its refit already.
inline constexpr double kHealedShare = 0.45;

// Factors of the errors of pruned and of condensed layers; infinite: not at all.
struct MixWeights {
  double pruning = 1, condensing = 1;
};

// Measures once what the layers lose and what that does to the logits, then divides any total among
// them. Also what compress --size asks (sizing.h).
class MixPlanner {
 public:
  // `stats` are full statistics. `neuron_stats` of the same model; empty: no layer is condensed,
  // and errors of all layers count alike.
  MixPlanner(Session& session, const Model& model, const StatsInfo& info, const fs::path& stats,
             const std::string& neuron_stats, const std::string& spill_folder);

  // The cheapest plan with `total` experts' worth left over all layers; each layer's `loss` is its
  // cost. UsageError if no division is allowed.
  CompressionPlan Decide(int64_t total, const MixWeights& weights) const;
  // By MoE layer: what an error of the layer, relative to its stream, costs. 1 each without
  // neurons.
  const std::vector<double>& sensitivities() const { return sensitivities_; }

 private:
  // [layers][0..E] costs; nothing where a number is not allowed.
  std::vector<std::vector<double>> PruningCosts(const MixWeights& weights) const;
  std::vector<std::vector<double>> AllCosts(const std::vector<std::vector<double>>& pruned,
                                            const MixWeights& weights) const;

  const Model& model_;
  const StatsInfo& info_;
  std::optional<CondenseStats> neurons_;
  std::vector<double> sensitivities_;
  std::vector<std::vector<NaeeSet>> curves_;
};

// Experts' worth over all layers that fit a size. UsageError if not even one does.
int64_t TotalWithin(const Model& model, const StatsInfo& info, const std::string& size);

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
