// plan.json: what to do with each layer of a model. Pure data: written by methods/, read by apply/,
// by people and by other programs; nested JSON with a schema number (docs/FORMATS.md). A
// hand-written plan is a valid plan: only `schema`, `layers[].layer` and `layers[].kept` are
// required to apply it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"         // Json, OrderedJson
#include "model/fused_part.h"  // FusedPart
#include "model/model.h"       // Model, ModelConfig

namespace winnow {

// What replaces a layer whose router goes (CD-MoE): the shared expert, if there is one, and experts
// with fixed weights, or single neurons of all experts.
struct CondensePlanOfLayer {
  std::vector<int32_t> experts;  // in the order chosen
  // [E] fixed weight of each expert; nothing where it was never selected: kUnselectedAlpha is used.
  std::vector<std::optional<double>> alphas;
  // [experts] rows of each expert in `experts` that stay; empty: all of every one.
  std::vector<std::vector<int32_t>> neurons;
  // Of the search that chose them: the objective after each step and of what was tried in it.
  std::vector<double> divergence;
  std::vector<std::vector<double>> candidates;
};

struct LayerPlan {
  int32_t layer = 0;             // decoder index
  int64_t num_experts = 0;       // before
  std::vector<int32_t> kept;     // ascending
  std::vector<int32_t> dropped;  // ascending
  std::optional<double> loss;    // of the method's objective
  std::optional<double> margin;  // (second best - best) / best; nothing if there was one candidate
  std::optional<double> beta = {};  // experts below this share of the best are skipped at run time
  std::optional<int32_t> moe_layer = {};  // index among the MoE layers
  // Set: the layer is condensed, and `kept` are its experts, ascending.
  std::optional<CondensePlanOfLayer> condensed = {};
};

// The parts of a condensed layer in order, the shared expert first if the layer has one that can be
// a part of the same SwiGLU (no gate of its own).
std::vector<FusedPart> FusedParts(const LayerPlan& layer, const ModelConfig& config);
// Fixed weights of `condensed->experts`.
std::vector<double> AlphasOf(const CondensePlanOfLayer& condensed);

// The numbers below `num_experts` that are not among `some` (ascending): dropped from kept and the
// other way round.
std::vector<int32_t> OtherExperts(const std::vector<int32_t>& some, int64_t num_experts);

// A choice made among the survivors of an earlier one (`survivors`: their original numbers, of
// `num_experts` in all) as a choice among all experts.
void ComposeWithSurvivors(const std::vector<int32_t>& survivors, int64_t num_experts,
                          LayerPlan& layer);

struct CompressionPlan {
  std::string method;
  std::string search;  // how the set was found, e.g. "enumeration"
  std::string objective;
  std::string model_type;
  std::string model_fingerprint;     // empty in hand-written plans
  std::string target;                // loader the result must satisfy
  std::vector<std::string> sources;  // names of the calibration texts
  int64_t calibration_tokens = 0;
  // Factors of the texts' sums by name (plan --mix); empty: 1 each.
  std::vector<std::pair<std::string, double>> mix = {};
  // Mean of ||z - zhat||^2 / ||z||^2 over tokens and layers, z the routed output: what is lost of
  // it, in all and on each text.
  std::optional<double> output_loss = {};
  std::vector<std::pair<std::string, double>> output_loss_by_source = {};
  uint64_t bytes_before = 0, bytes_after = 0;  // of the weights
  // Of a search for layers to condense: MoE layers in the order chosen, the objective after each
  // step and of what was tried in it (ascending).
  std::vector<int32_t> layer_order = {};
  std::vector<double> layer_divergence = {};
  std::vector<std::vector<double>> layer_candidates = {};
  // Or of each MoE layer alone: KL divergence of the logits.
  std::vector<double> layer_kl = {};
  std::vector<LayerPlan> layers;  // MoE layers, ascending

  bool condenses() const;
};

OrderedJson PlanToJson(const CompressionPlan& plan);
// Strict: unknown keys are refused with the nearest known one; ModelError names the key.
CompressionPlan PlanFromJson(const Json& json, const std::string& where);
CompressionPlan ReadPlan(const fs::path& path);

// UsageError if the plan does not fit the model: another model_type or fingerprint, layers that are
// no MoE layers or missing, ids out of range or out of order, fewer survivors than k.
void CheckPlan(const CompressionPlan& plan, const Model& model);

// Thresholds of each decoder layer for skipping; empty if the plan has none.
std::vector<double> SkipBetasOf(const CompressionPlan& plan, int64_t num_layers);

// Survivors of each decoder layer as LayerReader takes them (empty = all). Not of condensed layers.
std::vector<std::vector<int32_t>> KeptExperts(const CompressionPlan& plan, int64_t num_layers);

}  // namespace winnow
