// A model family as data: which config keys it reads, what they default to, which properties its
// layers have and what its tensors are called. One file per family under families/; nothing else in
// Winnow knows a family's name. Adding a family whose properties exist already costs one such file;
// a family with a new property adds the property here and the code that honours it.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace winnow {

// RMSNorm of queries and keys before RoPE.
enum class QkNorm : uint8_t { kNone, kPerHead, kWholeProjection };

// Which layers are MoE layers.
enum class MoeLayerRule : uint8_t {
  kEveryLayer,
  // Not in `mlp_only_layers` and (i + 1) % decoder_sparse_step == 0.
  kSparseStep,
  // i >= first_k_dense_replace and i % moe_layer_freq == 0.
  kFirstDense,
};

// When an attention projection has a bias.
enum class BiasRule : uint8_t {
  kNever,
  kUnlessQkvBiasFalse,  // `qkv_bias`, default true
  kIfAttentionBias,     // `attention_bias`, default false
};

enum class NormalizeTopk : uint8_t { kAlways, kIfNormTopkProb };

enum class SharedExpert : uint8_t {
  kNone,
  kWidthKey,          // width under shared_width_key, multiplied by sigmoid(x . shared_expert_gate)
  kMultipleOfExpert,  // n_shared_experts x expert width as one MLP, weight 1
};

// Tensor names inside `model.layers.{i}.`; {e} is the expert. An empty name does not exist.
struct FamilyTensorNames {
  std::string_view router;
  std::string_view expert_gate;
  std::string_view expert_up;
  std::string_view expert_down;
  std::string_view shared_gate;
  std::string_view shared_up;
  std::string_view shared_down;
  std::string_view shared_router;  // [1, hidden], the sigmoid gate
  std::string_view dense_gate;
  std::string_view dense_up;
  std::string_view dense_down;
  // The fused layout written by newer libraries: [E, 2I, H] and [E, H, I], no `.weight`.
  std::string_view fused_router;
  std::string_view fused_gate_up;
  std::string_view fused_down;
};

// Values of absent config keys, as the reference implementation's config class has them.
struct FamilyDefaults {
  int64_t num_key_value_heads = 0;  // 0: as many as attention heads
  double rope_theta = 10000.0;
  double rms_norm_eps = 1e-6;
  int64_t num_experts_per_tok = 0;  // 0: must be given
};

struct Family {
  std::string_view model_type;
  std::string_view architecture;
  std::string_view expert_width_key;  // config key of the experts' intermediate size
  std::string_view shared_width_key;
  std::string_view num_experts_key;  // the key to write; aliases are read for every family
  FamilyDefaults defaults;
  MoeLayerRule moe_layers = MoeLayerRule::kEveryLayer;
  BiasRule qkv_bias = BiasRule::kNever;
  BiasRule output_bias = BiasRule::kNever;
  QkNorm qk_norm = QkNorm::kNone;
  NormalizeTopk normalize_topk = NormalizeTopk::kIfNormTopkProb;
  double normalize_epsilon = 0.0;  // added to the sum of the selected probabilities
  SharedExpert shared_expert = SharedExpert::kNone;
  bool reads_clip_qkv = false;
  // A number under `sliding_window` limits attention (else it only does with use_sliding_window).
  bool sliding_window_by_value = false;
  FamilyTensorNames names;
  // Expert counts that stock loaders are known to accept only in certain steps: 0 = any.
  bool needs_remote_code = false;
};

// Every family Winnow reads.
std::span<const Family* const> AllFamilies();
// Null if unknown.
const Family* FindFamily(std::string_view model_type);

}  // namespace winnow
