// What a statistics folder says about itself: stats.json. Everything a plan needs to know about the
// model is here, so that planning needs no model. Layout of the folder: docs/FORMATS.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"    // fs
#include "base/json.h"    // OrderedJson
#include "model/model.h"  // Model

namespace winnow {

// What progressive pruning compares a layer of the pruned stream with: the intact routed output as
// published, or what brings the stream back to the intact one, h'* - h - s (methods.md 13.1).
enum class ProgressiveTarget : uint8_t { kPublished, kRepairDrift };

// How much is gathered: routing only; also the outputs of the experts each token used; or the
// outputs of every expert on every token (Gram matrices, needed by NAEE).
enum class StatsLevel : uint8_t { kRouting, kRouted, kFull };

std::string_view StatsLevelName(StatsLevel level);
StatsLevel ParseStatsLevel(const std::string& name);  // UsageError

struct StatsSource {
  std::string name;
  std::string fingerprint;  // of its token ids
  int64_t num_sequences = 0;
  int64_t num_tokens = 0;
  // Tokens of each sequence, run-length coded [length, repeats]: batches are cut from them.
  std::vector<std::pair<int64_t, int64_t>> lengths;
  // What plans multiply the source's sums with (plan --mix). Not a part of stats.json.
  double mix = 1;
};

struct StatsLayer {
  int32_t layer = 0;  // decoder index
  int64_t num_experts = 0;
  uint64_t expert_bytes = 0;  // of one expert, as stored
  // Observed as if a plan were applied: the original numbers of its survivors, ascending, which the
  // records count from 0. Empty: the model as it is.
  std::vector<int32_t> as_if_kept = {};
  int64_t model_num_experts = 0;  // with as_if_kept: of the model itself
};

// Consecutive tokens of one source whose error makes one norm of the published loss.
struct StatsBatch {
  int64_t first_token = 0, num_tokens = 0;
  size_t source = 0;
  double mix = 1;  // the source's
};

struct StatsInfo {
  std::string model_fingerprint;
  std::string model_type;
  uint64_t model_bytes = 0;
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_experts_per_tok = 0;
  bool norm_topk_prob = false;
  double normalize_epsilon = 0;
  StatsLevel level = StatsLevel::kFull;
  std::string compute;
  std::string isa;
  int64_t batch = 8;                        // sequences in one batch of the published loss
  std::optional<int64_t> progressive_keep;  // set if gathered by the two-stream sweep
  ProgressiveTarget progressive_target = ProgressiveTarget::kPublished;
  // The text has a mask: some tokens count less than others, or nothing. Off: plans count all.
  bool token_weights = false;
  std::vector<StatsSource> sources;
  std::vector<StatsLayer> layers;  // MoE layers, ascending

  int64_t num_tokens() const;
  int64_t num_experts() const;  // over all layers
  // Token counts of the batches, in order; batches never straddle sources.
  std::vector<int64_t> BatchTokens() const;
  std::vector<StatsBatch> Batches() const;
};

OrderedJson StatsInfoToJson(const StatsInfo& info);
// ModelError for anything missing, mistyped or out of range.
StatsInfo StatsInfoFromJson(const Json& json, const std::string& where);
StatsInfo ReadStatsInfo(const fs::path& stats_folder);
fs::path LayerStatsPath(const fs::path& stats_folder, int32_t layer);

// The model's part of a StatsInfo.
StatsInfo DescribeModel(const Model& model);

}  // namespace winnow
