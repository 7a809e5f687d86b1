// Log-probabilities of one position, from its logits. The token's own value and those of the
// likeliest come from one formula, so that equal tokens have bitwise equal values: a client may ask
// "is it the likeliest?" by comparing numbers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace winnow {

struct TokenScore {
  int32_t token = 0;
  double log_probability = 0;  // natural logarithm
};

struct PositionScore {
  TokenScore chosen;
  std::vector<TokenScore> likeliest;  // descending, the lower id first where two are equal
};

// Of logits [V] and the token that follows; `num_likeliest` of the whole row. ModelError if the
// logits are not finite, UsageError if `token` is outside the row.
PositionScore ScorePosition(std::span<const float> logits, int32_t token, int num_likeliest);

}  // namespace winnow
