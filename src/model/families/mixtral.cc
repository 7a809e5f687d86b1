// Mixtral 8x7B, 8x22B: w1 = gate, w3 = up, w2 = down; top-k weights always renormalised.
#include "model/families/families.h"

namespace winnow::families {

const Family kMixtral = {
    .model_type = "mixtral",
    .architecture = "MixtralForCausalLM",
    .expert_width_key = "intermediate_size",
    .shared_width_key = {},
    .num_experts_key = "num_local_experts",
    .defaults = {.num_key_value_heads = 8,
                 .rope_theta = 1e6,
                 .rms_norm_eps = 1e-5,
                 .num_experts_per_tok = 2},
    .normalize_topk = NormalizeTopk::kAlways,
    .sliding_window_by_value = true,
    .names = {.router = "block_sparse_moe.gate.weight",
              .expert_gate = "block_sparse_moe.experts.{e}.w1.weight",
              .expert_up = "block_sparse_moe.experts.{e}.w3.weight",
              .expert_down = "block_sparse_moe.experts.{e}.w2.weight",
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
