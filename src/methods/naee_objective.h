// What NAEE's error of a token counts for (plan --objective). Published: the square root of each
// batch's sum, every token alike. The others sum squares over all tokens, as they are or relative
// to what the token has.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace winnow {

enum class NaeeObjective : uint8_t {
  kUnsquared,  // sum over batches of sqrt(sum_t q_t), as published
  kSquared,    // sum_t q_t
  kOutput,     // sum_t q_t / ||z_t||^2, relative to the layer's routed output
  kStream,     // sum_t q_t / ||h'_t||^2, relative to the residual stream behind the layer
};

// "unsquared", "squared", "relative-to-output", "relative-to-stream".
std::string_view NaeeObjectiveName(NaeeObjective objective);
std::vector<std::string> NaeeObjectiveNames();
// UsageError for other names.
NaeeObjective ParseNaeeObjective(const std::string& name);

// The factor of a token's error, from |z|^2 and |h'|^2.
inline double TokenFactor(NaeeObjective objective, double output_squared, double stream_squared) {
  switch (objective) {
    case NaeeObjective::kOutput:
      return output_squared > 0 ? 1 / output_squared : 0;
    case NaeeObjective::kStream:
      return stream_squared > 0 ? 1 / stream_squared : 0;
    default:
      return 1;
  }
}

// What a batch adds to the loss.
inline double BatchLoss(NaeeObjective objective, double sum) {
  return objective == NaeeObjective::kUnsquared ? std::sqrt(sum) : sum;
}

}  // namespace winnow
