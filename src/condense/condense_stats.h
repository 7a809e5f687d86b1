// What `observe --method cd-moe` leaves in a folder: stats.json with everything that plans need of
// each layer, and the search text itself (search.safetensors), on which plans search layers.
// Layout: docs/FORMATS.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"               // fs
#include "base/json.h"               // Json, OrderedJson
#include "condense/expert_search.h"  // GreedyStep
#include "forward/token_set.h"       // TokenSet
#include "model/fused_part.h"        // kUnselectedAlpha
#include "model/model.h"             // Model

namespace winnow {

struct CondenseLayer {
  int32_t layer = 0;      // decoder index
  int32_t moe_layer = 0;  // index among the MoE layers
  int64_t num_experts = 0;
  // Of the weights the router returned over tokens that selected the expert [E].
  std::vector<double> alpha_sum = {};
  std::vector<int64_t> alpha_count = {};
  std::vector<GreedyStep> steps = {};
  // --method condense: neurons in the order chosen, as experts and rows of theirs; the error of the
  // layer with the first w experts' worth of them, relative to its stream, and least-squares
  // weights of what is chosen of each expert [1 + max_experts][E].
  std::vector<int32_t> neuron_experts = {}, neuron_rows = {};
  std::vector<double> width_errors = {};
  // The same with those weights alone, before any refit of the down projections.
  std::vector<double> width_fold_errors = {};
  std::vector<std::vector<double>> width_alphas = {};

  // The mean weight of an expert; nothing if no token selected it.
  std::optional<double> Alpha(int32_t expert) const;
  // The same with what the published program takes in its place.
  double AlphaOrDefault(int32_t expert) const { return Alpha(expert).value_or(kUnselectedAlpha); }
};

struct CondenseStats {
  std::string model_fingerprint, model_type;
  int64_t num_layers = 0;
  std::string method;  // "cd-moe" or "condense"
  std::string compute, isa;
  int64_t max_experts = 0;   // of the search; of the width, in experts' worth
  int64_t most_neurons = 0;  // condense: whose moments were taken
  std::vector<std::string> search_sources, alpha_sources;
  std::string search_fingerprint, alpha_fingerprint;
  int64_t search_tokens = 0, alpha_tokens = 0;
  std::vector<CondenseLayer> layers;  // MoE layers, ascending
};

OrderedJson CondenseStatsToJson(const CondenseStats& stats);
// ModelError for anything missing, mistyped or out of range.
CondenseStats CondenseStatsFromJson(const Json& json, const std::string& where);
// Whether the folder holds such statistics (and not those of NAEE).
bool IsCondenseStats(const fs::path& folder);
CondenseStats ReadCondenseStats(const fs::path& folder);
// UsageError if they are of another model.
void CheckCondenseStats(const CondenseStats& stats, const Model& model);

void WriteSearchTokens(const fs::path& folder, const TokenSet& tokens);
// ModelError if it is not the text that was observed.
TokenSet ReadSearchTokens(const fs::path& folder, const CondenseStats& stats);
std::string FingerprintOf(const TokenSet& tokens);

}  // namespace winnow
