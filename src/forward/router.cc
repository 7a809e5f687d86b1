#include "forward/router.h"

#include <algorithm>
#include <vector>

#include "forward/expert_skipping.h"
#include "kernels/elementwise.h"

namespace winnow {

void SelectExperts(const ModelConfig& config, const float* logits, int64_t n, int64_t num_experts,
                   int32_t* topk_ids, float* topk_weights, double beta, float* dropped_weight) {
  const auto k = config.num_experts_per_tok;
  std::vector<float> probabilities(static_cast<size_t>(num_experts));
  std::vector<int32_t> order(static_cast<size_t>(num_experts));
  for (int64_t t = 0; t < n; ++t) {
    std::copy_n(logits + t * num_experts, num_experts, probabilities.begin());
    Softmax(probabilities.data(), 1, num_experts, num_experts);
    for (int64_t e = 0; e < num_experts; ++e) {
      order[static_cast<size_t>(e)] = static_cast<int32_t>(e);
    }
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
      const float pa = probabilities[static_cast<size_t>(a)];
      const float pb = probabilities[static_cast<size_t>(b)];
      return pa > pb || (pa == pb && a < b);
    });
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      topk_ids[t * k + i] = order[static_cast<size_t>(i)];
      topk_weights[t * k + i] = probabilities[static_cast<size_t>(order[static_cast<size_t>(i)])];
      sum += topk_weights[t * k + i];
    }
    if (dropped_weight != nullptr) dropped_weight[t] = 0;
    if (beta > 0) {
      const float least = static_cast<float>(beta) * topk_weights[t * k];
      float dropped = 0;
      for (int64_t i = 1; i < k; ++i) {
        if (!(topk_weights[t * k + i] < least)) continue;
        dropped += topk_weights[t * k + i];
        topk_ids[t * k + i] = SkippedSlot(topk_ids[t * k + i]);
        topk_weights[t * k + i] = 0;
      }
      if (dropped_weight != nullptr) dropped_weight[t] = dropped / sum;
      if (dropped > 0) {  // summed anew, so that a single expert's weight is exactly 1
        sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += topk_weights[t * k + i];
      }
    }
    if (!config.norm_topk_prob) continue;
    sum += static_cast<float>(config.normalize_epsilon);
    for (int64_t i = 0; i < k; ++i) topk_weights[t * k + i] /= sum;
  }
}

}  // namespace winnow
