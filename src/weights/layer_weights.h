// One decoder layer's weights in memory: matrices as stored (views into one buffer), vectors
// widened to f32. Read by LayerReader, used by forward/. A layer may hold a subset of its experts:
// then the router has just their rows, which is what the pruned checkpoint would hold.
//
// A layer with a router is a MoE layer. One without adds up all it has: the dense SwiGLU, the
// shared expert, and in a condensed layer its experts, each times a fixed weight.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

// gate, up [width, hidden]; down [hidden, width].
struct FeedForwardWeights {
  WeightMatrix gate, up, down;
  int64_t width() const { return gate.rows; }
};

struct LayerWeights {
  std::vector<float> input_norm, post_attention_norm;  // [hidden]
  WeightMatrix q, k, v, o;
  std::vector<float> q_bias, k_bias, v_bias, o_bias;  // empty if the family has none
  std::vector<float> q_norm, k_norm;                  // empty if the family has none
  WeightMatrix router;                                // [E, hidden]; MoE layers alone
  std::vector<FeedForwardWeights> experts;            // [E]
  std::vector<float> expert_alphas;                   // [E] in condensed layers
  FeedForwardWeights shared;                          // empty without a shared expert
  WeightMatrix shared_router;                         // [1, hidden]
  FeedForwardWeights dense;                           // empty in MoE layers

  int64_t num_experts() const { return static_cast<int64_t>(experts.size()); }
  // The same layer with only experts `kept` (ascending): views of the same bytes, and a router of
  // their rows copied into `router_rows`, which must outlive the result.
  LayerWeights WithExperts(const std::vector<int32_t>& kept,
                           AlignedBuffer<std::byte>& router_rows) const;
  // The same layer without its router, condensed to the shared expert and `kept` (in that order)
  // with their fixed weights: views of the same bytes.
  LayerWeights Condensed(const std::vector<int32_t>& kept, std::vector<float> alphas) const;
};

}  // namespace winnow
