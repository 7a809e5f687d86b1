// OLMoE: RMSNorm over the whole q and k projection, optional clip_qkv, no renormalisation as
// released.
#include "model/families/families.h"

namespace winnow::families {

const Family kOlmoe = {
    .model_type = "olmoe",
    .architecture = "OlmoeForCausalLM",
    .expert_width_key = "intermediate_size",
    .shared_width_key = {},
    .num_experts_key = "num_experts",
    .defaults = {.num_key_value_heads = 0,
                 .rope_theta = 1e4,
                 .rms_norm_eps = 1e-5,
                 .num_experts_per_tok = 8},
    .qkv_bias = BiasRule::kIfAttentionBias,
    .output_bias = BiasRule::kIfAttentionBias,
    .qk_norm = QkNorm::kWholeProjection,
    .reads_clip_qkv = true,
    .names = {.router = "mlp.gate.weight",
              .expert_gate = "mlp.experts.{e}.gate_proj.weight",
              .expert_up = "mlp.experts.{e}.up_proj.weight",
              .expert_down = "mlp.experts.{e}.down_proj.weight",
              .shared_gate = {},
              .shared_up = {},
              .shared_down = {},
              .shared_router = {},
              .dense_gate = "mlp.gate_proj.weight",  // fused condensed layers alone
              .dense_up = "mlp.up_proj.weight",
              .dense_down = "mlp.down_proj.weight",
              .fused_router = "mlp.gate.weight",
              .fused_gate_up = "mlp.experts.gate_up_proj",
              .fused_down = "mlp.experts.down_proj"},
};

}  // namespace winnow::families
