// DeepSeekMoE v1 (16B): dense first layers, shared experts stored as one MLP and always on. Routing
// weights are not renormalised as released; with norm_topk_prob the published code adds 1e-20 to
// the sum.
#include "model/families/families.h"

namespace winnow::families {

const Family kDeepseek = {
    .model_type = "deepseek",
    .architecture = "DeepseekForCausalLM",
    .expert_width_key = "moe_intermediate_size",
    .shared_width_key = "n_shared_experts",
    .num_experts_key = "n_routed_experts",
    .defaults = {.num_key_value_heads = 32,
                 .rope_theta = 1e4,
                 .rms_norm_eps = 1e-6,
                 .num_experts_per_tok = 0},
    .moe_layers = MoeLayerRule::kFirstDense,
    .qkv_bias = BiasRule::kIfAttentionBias,
    .output_bias = BiasRule::kIfAttentionBias,
    .normalize_epsilon = 1e-20,
    .shared_expert = SharedExpert::kMultipleOfExpert,
    .names = {.router = "mlp.gate.weight",
              .expert_gate = "mlp.experts.{e}.gate_proj.weight",
              .expert_up = "mlp.experts.{e}.up_proj.weight",
              .expert_down = "mlp.experts.{e}.down_proj.weight",
              .shared_gate = "mlp.shared_experts.gate_proj.weight",
              .shared_up = "mlp.shared_experts.up_proj.weight",
              .shared_down = "mlp.shared_experts.down_proj.weight",
              .shared_router = {},
              .dense_gate = "mlp.gate_proj.weight",
              .dense_up = "mlp.up_proj.weight",
              .dense_down = "mlp.down_proj.weight",
              .fused_router = "mlp.gate.weight",
              .fused_gate_up = "mlp.experts.gate_up_proj",
              .fused_down = "mlp.experts.down_proj"},
    .needs_remote_code = true,
};

}  // namespace winnow::families
