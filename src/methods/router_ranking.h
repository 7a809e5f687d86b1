// How a router ranks the experts of one token, in double, from its logits as recorded. Ties go to
// the lower number, as in the forward pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>

namespace winnow {

// order[0..ranked) become the experts with the highest logits, best first; `order` has a place for
// every expert.
template <class Index>
void RankExperts(std::span<const float> logits, int64_t ranked, std::span<Index> order) {
  std::iota(order.begin(), order.end(), Index{0});
  std::partial_sort(order.begin(), order.begin() + ranked, order.end(), [&](Index a, Index b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
}

// The softmax of the logits. `best`: the expert with the highest one.
inline void SoftmaxOfLogits(std::span<const float> logits, int64_t best, std::span<double> mass) {
  const auto highest = static_cast<double>(logits[static_cast<size_t>(best)]);
  double total = 0;
  for (size_t e = 0; e < logits.size(); ++e) {
    mass[e] = std::exp(static_cast<double>(logits[e]) - highest);
    total += mass[e];
  }
  for (double& m : mass) m /= total;
}

}  // namespace winnow
