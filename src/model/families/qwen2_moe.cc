// Qwen1.5-MoE, Qwen2-MoE: bias on q, k, v; a shared expert behind a sigmoid gate.
#include "model/families/families.h"

namespace winnow::families {

const Family kQwen2Moe = {
    .model_type = "qwen2_moe",
    .architecture = "Qwen2MoeForCausalLM",
    .expert_width_key = "moe_intermediate_size",
    .shared_width_key = "shared_expert_intermediate_size",
    .num_experts_key = "num_experts",
    .defaults = {.num_key_value_heads = 16,
                 .rope_theta = 1e4,
                 .rms_norm_eps = 1e-6,
                 .num_experts_per_tok = 4},
    .moe_layers = MoeLayerRule::kSparseStep,
    .qkv_bias = BiasRule::kUnlessQkvBiasFalse,
    .shared_expert = SharedExpert::kWidthKey,
    .names = {.router = "mlp.gate.weight",
              .expert_gate = "mlp.experts.{e}.gate_proj.weight",
              .expert_up = "mlp.experts.{e}.up_proj.weight",
              .expert_down = "mlp.experts.{e}.down_proj.weight",
              .shared_gate = "mlp.shared_expert.gate_proj.weight",
              .shared_up = "mlp.shared_expert.up_proj.weight",
              .shared_down = "mlp.shared_expert.down_proj.weight",
              .shared_router = "mlp.shared_expert_gate.weight",
              .dense_gate = "mlp.gate_proj.weight",
              .dense_up = "mlp.up_proj.weight",
              .dense_down = "mlp.down_proj.weight",
              .fused_router = "mlp.gate.weight",
              .fused_gate_up = "mlp.experts.gate_up_proj",
              .fused_down = "mlp.experts.down_proj"},
};

}  // namespace winnow::families
