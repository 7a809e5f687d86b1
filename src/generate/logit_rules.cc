#include "generate/logit_rules.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace winnow {
namespace {

// As CTRL (arXiv 1909.05858) and transformers apply it.
void Repeat(float penalty, float& logit) {
  logit = logit > 0 ? logit / penalty : logit * penalty;
}

}  // namespace

void ApplyLogitRules(const LogitRules& rules, const TokenHistory& history, float temperature,
                     std::span<float> logits) {
  const auto row = [&](int32_t id) -> float* {
    return id >= 0 && static_cast<size_t>(id) < logits.size() ? &logits[static_cast<size_t>(id)]
                                                              : nullptr;
  };
  if (rules.repetition_penalty != 1) {
    for (const int32_t id : history.prompt()) {
      if (float* logit = row(id)) Repeat(rules.repetition_penalty, *logit);
    }
    for (const auto& [id, count] : history.generated()) {
      if (history.prompt().contains(id)) continue;
      if (float* logit = row(id)) Repeat(rules.repetition_penalty, *logit);
    }
  }
  if (rules.presence_penalty != 0 || rules.frequency_penalty != 0) {
    for (const auto& [id, count] : history.generated()) {
      if (float* logit = row(id)) {
        *logit -= rules.presence_penalty + rules.frequency_penalty * static_cast<float>(count);
      }
    }
  }
  for (const auto& [id, bias] : rules.logit_bias) {
    if (float* logit = row(id)) *logit += bias;
  }
  if (rules.min_p > 0 && temperature > 0 && !logits.empty()) {
    const float floor =
        *std::max_element(logits.begin(), logits.end()) + temperature * std::log(rules.min_p);
    for (float& logit : logits) {
      if (logit < floor) logit = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace winnow
