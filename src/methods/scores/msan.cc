// MSAN, arXiv 2606.15716: the mean squared output norm over the tokens that use the expert.
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return MeanOverTokens(input.summary.norm_squared, input.summary.tokens);
}

}  // namespace

const ScoreMethod kMsan = {"msan", "mean of |f|^2", StatsLevel::kRouted, Score};

}  // namespace winnow
