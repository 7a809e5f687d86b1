// Which experts a token uses and with which weights, for every family whose scores are a softmax.
#pragma once

#include <cstdint>

#include "model/model_config.h"  // ModelConfig

namespace winnow {

// logits [n, E] -> ids, weights [n, k], highest probability first; equal probabilities go to the
// lower expert. Probabilities are a f32 softmax over all E; weights are renormalised if
// config.norm_topk_prob. With beta > 0 experts whose probability is less than beta times the
// highest (f32, strictly) are skipped: ids ~id (forward/expert_skipping.h: IsSkipped,
// ExpertOfSlot), weight 0, and no part of the renormalisation; dropped_weight [n], if given,
// becomes their share of the k probabilities.
void SelectExperts(const ModelConfig& config, const float* logits, int64_t n, int64_t num_experts,
                   int32_t* topk_ids, float* topk_weights, double beta = 0,
                   float* dropped_weight = nullptr);

}  // namespace winnow
