#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "generate/generator.h"

namespace winnow {
namespace {

// SplitMix64: the same draws on every machine, which std:: distributions do not promise.
double NextUniform(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

}  // namespace

int32_t SampleToken(std::span<const float> logits, const SamplingOptions& options,
                    uint64_t& state) {
  if (options.temperature <= 0) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  // Below this a token's share is less than exp(-40) of the likeliest: too little for any draw, and
  // leaving it out spares sorting the whole vocabulary.
  const float floor = *std::max_element(logits.begin(), logits.end()) - 40 * options.temperature;
  std::vector<int32_t> order;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] < floor)) order.push_back(static_cast<int32_t>(i));
  }
  const auto higher = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  size_t candidates = order.size();
  if (options.top_k > 0) candidates = std::min(candidates, static_cast<size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(candidates),
                    order.end(), higher);
  std::vector<double> probability(candidates);
  double total = 0;
  for (size_t i = 0; i < candidates; ++i) {
    const float gap = logits[static_cast<size_t>(order[i])] - logits[static_cast<size_t>(order[0])];
    probability[i] = std::exp(static_cast<double>(gap / options.temperature));
    total += probability[i];
  }
  if (options.top_p < 1.0f) {  // the smallest set of the likeliest tokens that reaches top_p
    double mass = 0;
    const double wanted = static_cast<double>(options.top_p) * total;
    size_t kept = 0;
    while (kept < candidates && mass < wanted) mass += probability[kept++];
    candidates = std::max<size_t>(1, kept);
    total = mass;
  }
  double draw = NextUniform(state) * total;
  for (size_t i = 0; i + 1 < candidates; ++i) {
    draw -= probability[i];
    if (draw < 0) return order[i];
  }
  return order[candidates - 1];
}

int32_t DrawToken(std::span<const float> logits, int64_t vocabulary_limit,
                  const SamplingOptions& options, uint64_t& state) {
  if (vocabulary_limit > 0) {
    logits = logits.first(std::min(logits.size(), static_cast<size_t>(vocabulary_limit)));
  }
  const int32_t token = SampleToken(logits, options, state);
  if (!std::isfinite(logits[static_cast<size_t>(token)])) {
    throw ModelError("the model's scores are not finite",
                     "the weights hold NaN or Inf: see winnow doctor MODEL");
  }
  return token;
}

}  // namespace winnow
