// What the router gave each expert: the sums that fixed weights (CD-MoE, section 3.2) and energies
// of neurons are made of. Watches a layer by itself or from within another observer.
#pragma once

#include <cstdint>
#include <vector>

#include "forward/expert_skipping.h"  // IsSkipped
#include "forward/moe_observer.h"     // MoeObserver

namespace winnow {

class RoutingSums : public MoeObserver {
 public:
  explicit RoutingSums(int64_t num_experts)
      : weight(static_cast<size_t>(num_experts)), tokens(static_cast<size_t>(num_experts)) {}
  void OnTokens(const MoeTokens& m) override {
    for (int64_t i = 0; i < m.num_tokens * m.num_experts_per_tok; ++i) {
      if (IsSkipped(m.topk_ids[i])) continue;
      const auto expert = static_cast<size_t>(m.topk_ids[i]);
      weight[expert] += static_cast<double>(m.topk_weights[i]);
      ++tokens[expert];
    }
  }

  std::vector<double> weight;   // of the tokens that chose the expert
  std::vector<int64_t> tokens;  // how many those are
};

}  // namespace winnow
