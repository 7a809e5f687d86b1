// Qwen3-MoE: explicit head_dim, per-head q/k norm, renormalisation by flag, no shared expert.
#include "model/families/families.h"

namespace winnow::families {

const Family kQwen3Moe = {
    .model_type = "qwen3_moe",
    .architecture = "Qwen3MoeForCausalLM",
    .expert_width_key = "moe_intermediate_size",
    .shared_width_key = {},
    .num_experts_key = "num_experts",
    .defaults = {.num_key_value_heads = 4,
                 .rope_theta = 1e4,
                 .rms_norm_eps = 1e-6,
                 .num_experts_per_tok = 8},
    .moe_layers = MoeLayerRule::kSparseStep,
    .qkv_bias = BiasRule::kIfAttentionBias,
    .output_bias = BiasRule::kIfAttentionBias,
    .qk_norm = QkNorm::kPerHead,
    .names = {.router = "mlp.gate.weight",
              .expert_gate = "mlp.experts.{e}.gate_proj.weight",
              .expert_up = "mlp.experts.{e}.up_proj.weight",
              .expert_down = "mlp.experts.{e}.down_proj.weight",
              .shared_gate = {},
              .shared_up = {},
              .shared_down = {},
              .shared_router = {},
              .dense_gate = "mlp.gate_proj.weight",
              .dense_up = "mlp.up_proj.weight",
              .dense_down = "mlp.down_proj.weight",
              .fused_router = "mlp.gate.weight",
              .fused_gate_up = "mlp.experts.gate_up_proj",
              .fused_down = "mlp.experts.down_proj"},
};

}  // namespace winnow::families
