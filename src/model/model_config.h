// What a checkpoint's config.json says, checked and in one dialect. Everything after this header
// branches on these properties, never on a family's name.
//
// Letters used in shapes: hidden = hidden_size, heads, kv_heads, head_dim, E = num_experts of the
// layer, k = num_experts_per_tok, I = expert_width, S = shared_width, V = vocab_size.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"            // OrderedJson
#include "model/family.h"         // Family, QkNorm
#include "model/layer_formats.h"  // LayerFormats, PackedFormat

namespace winnow {

struct LayerConfig {
  bool is_moe = false;
  int64_t num_experts = 0;   // E; the router has this many rows
  int64_t expert_width = 0;  // I
  int64_t shared_width = 0;  // S, 0 if there is no shared expert
  int64_t dense_width = 0;   // of a layer without experts, or of a fused condensed layer
  double skip_beta = 0;      // experts below this share of the best are skipped (`betas`); 0: none
  // A layer that had experts and lost its router (CD-MoE; `condensed_layers`): every token uses all
  // that is left of it, dense, shared expert and num_experts experts. is_moe is false.
  bool is_condensed = false;
  std::vector<double> expert_alphas = {};  // [num_experts] of a condensed layer: fixed weights
  LayerFormats formats = {};               // of matrices that are packed
};

// What becomes of a layer that is condensed, as its entry under `condensed_layers`.
struct CondensedLayer {
  int64_t layer = 0;                       // decoder index
  std::vector<double> expert_alphas = {};  // of experts that stay apart
  int64_t dense_width = 0;                 // of one fused SwiGLU; 0: the parts stay apart
};

struct RopeConfig {
  double theta = 10000.0;
  double linear_factor = 1.0;  // rope type "linear": inverse frequencies are divided by it
};

struct ModelConfig {
  const Family* family = nullptr;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;  // 0 if the config does not say
  float rms_norm_eps = 1e-6f;
  RopeConfig rope;
  int64_t attention_window = 0;  // keys a query may see, itself included; 0 = all
  bool qkv_bias = false;
  bool output_bias = false;
  QkNorm qk_norm = QkNorm::kNone;
  std::optional<float> clip_qkv;
  int64_t num_experts_per_tok = 0;  // k
  bool norm_topk_prob = false;
  double normalize_epsilon = 0.0;
  bool shared_expert_gated = false;
  bool tie_word_embeddings = false;
  std::string stored_dtype;  // `torch_dtype` or `dtype`, as written
  std::vector<int32_t> eos_token_ids;
  std::optional<int32_t> bos_token_id;
  std::vector<LayerConfig> layers;
  PackedFormat lm_head_format;  // empty: as stored

  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
  // Whether any matrix is packed; whether an expert's is, the shared one's included.
  bool is_packed() const;
  bool has_packed_experts() const;
  int64_t query_width() const { return num_heads * head_dim; }
  int64_t kv_width() const { return num_kv_heads * head_dim; }
  // Decoder indices of the MoE layers, ascending.
  std::vector<int32_t> MoeLayers() const;
  // The E shared by all MoE layers; nothing if they differ or there are none.
  std::optional<int64_t> UniformExperts() const;
};

// `where` is the path of config.json for messages. ModelError for anything missing, mistyped,
// contradictory or not supported, naming the key, what was expected and what was found.
ModelConfig ParseModelConfig(const OrderedJson& config, const std::string& where);

// UsageError naming the first id that is outside the model's vocabulary.
void CheckTokenIds(std::span<const int32_t> ids, const ModelConfig& config);

// The config with the thresholds of run-time skipping as NAEE's program writes them: `betas`, keyed
// by the decoder layer's index as a string. Without any the key is removed.
OrderedJson ConfigWithBetas(const OrderedJson& config, const std::vector<double>& betas);

// The config of a model whose MoE layers have different numbers of experts, one for each decoder
// layer (0: none): our extension `num_experts_per_layer`, beside the usual key with the most.
OrderedJson ConfigWithExpertsPerLayer(const OrderedJson& config, const Family& family,
                                      const std::vector<int64_t>& num_experts);

// The config with more layers condensed: our extension `condensed_layers`, keyed by the decoder
// layer's index, {"expert_alphas": [..]} or {"dense_width": n}. Entries that are there stay.
OrderedJson ConfigWithCondensedLayers(const OrderedJson& config,
                                      const std::vector<CondensedLayer>& layers);

// The config with `layers` (decoder indices that have experts now) as ordinary dense layers of
// `dense_width`, in the family's own words. UsageError, with the reason, where it has none for it.
OrderedJson ConfigWithDenseLayers(const OrderedJson& config, const ModelConfig& parsed,
                                  const std::vector<int32_t>& layers, int64_t dense_width);
// The width that all dense layers of the family's own form must have: of those there are, else
// `widest`.
int64_t StockDenseWidth(const ModelConfig& parsed, int64_t widest);

// The config of the same model with `num_experts` experts in every MoE layer: the family's key and
// every alias that is present are edited, everything else is kept in its order.
OrderedJson ConfigWithExperts(const OrderedJson& config, const Family& family, int64_t num_experts);

}  // namespace winnow
