#include "generate/token_scores.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

// Ids of the `count` largest logits. Insertion into a short list: count is at most a few dozen.
std::vector<int32_t> Likeliest(std::span<const float> logits, size_t count) {
  std::vector<int32_t> ids;
  count = std::min(count, logits.size());
  if (count == 0) return ids;
  ids.reserve(count + 1);
  for (size_t i = 0; i < logits.size(); ++i) {
    if (ids.size() == count && logits[i] <= logits[static_cast<size_t>(ids.back())]) continue;
    // Behind everything that is as large, so that the lower id stays first.
    const auto place = std::upper_bound(ids.begin(), ids.end(), logits[i], [&](float x, int32_t j) {
      return x > logits[static_cast<size_t>(j)];
    });
    ids.insert(place, static_cast<int32_t>(i));
    if (ids.size() > count) ids.pop_back();
  }
  return ids;
}

}  // namespace

PositionScore ScorePosition(std::span<const float> logits, int32_t token, int num_likeliest) {
  if (token < 0 || static_cast<size_t>(token) >= logits.size()) {
    throw UsageError("the token to score is outside the vocabulary",
                     "use ids of this model's tokenizer");
  }
  const double log_sum = LogSumExp(logits.data(), static_cast<int64_t>(logits.size()));
  if (!std::isfinite(log_sum)) {
    throw ModelError("the model's scores are not finite",
                     "the weights hold NaN or Inf: see winnow doctor MODEL");
  }
  const auto score = [&](int32_t id) {
    return TokenScore{id, static_cast<double>(logits[static_cast<size_t>(id)]) - log_sum};
  };
  PositionScore result{score(token), {}};
  for (const int32_t id : Likeliest(logits, static_cast<size_t>(std::max(0, num_likeliest)))) {
    result.likeliest.push_back(score(id));
  }
  return result;
}

}  // namespace winnow
