// Skipping experts at run time (NAEE, arXiv 2402.14800, section 3.3): of the k experts a router
// selects, those whose probability is less than beta times the highest are not run; the weights of
// the others are renormalised where the family does it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace winnow {

// One of the k places of a token's ids, as SelectExperts fills them: the expert's id or, if it is
// skipped, the id's complement ~id, which is negative. Both questions are asked only here.
constexpr bool IsSkipped(int32_t slot) {
  return slot < 0;
}
constexpr int32_t ExpertOfSlot(int32_t slot) {
  return IsSkipped(slot) ? ~slot : slot;
}
constexpr int32_t SkippedSlot(int32_t expert) {
  return ~expert;
}

// beta of each decoder layer; 0 or missing: nothing is skipped.
using SkipBetas = std::vector<double>;

// What skipping did, of each decoder layer.
struct SkipCounts {
  std::vector<int64_t> tokens;         // that went through the layer's router
  std::vector<int64_t> experts;        // run for them in all
  std::vector<int64_t> reduced;        // tokens with fewer than k
  std::vector<double> dropped_weight;  // sum of the share of the k probabilities not used

  SkipCounts() = default;
  explicit SkipCounts(size_t num_layers)
      : tokens(num_layers), experts(num_layers), reduced(num_layers), dropped_weight(num_layers) {}

  // Tokens of one layer, as SelectExperts left them: ids [num_tokens, k], dropped [num_tokens].
  void Count(int64_t layer, int64_t num_tokens, int64_t k, const int32_t* ids,
             const float* dropped) {
    const auto at = static_cast<size_t>(layer);
    tokens[at] += num_tokens;
    for (int64_t t = 0; t < num_tokens; ++t, ids += k) {
      const int64_t used = std::count_if(ids, ids + k, [](int32_t id) { return !IsSkipped(id); });
      experts[at] += used;
      reduced[at] += used < k ? 1 : 0;
      dropped_weight[at] += static_cast<double>(dropped[t]);
    }
  }
  // Counts of the same model.
  void Add(const SkipCounts& more) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] += more.tokens[i];
      experts[i] += more.experts[i];
      reduced[i] += more.reduced[i];
      dropped_weight[i] += more.dropped_weight[i];
    }
  }
};

}  // namespace winnow
