// REAP, arXiv 2510.13999: the mean of w |f| over the tokens that use the expert. Unlike
// the published program w is renormalised exactly where the model does it. Unused experts score 0.
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return MeanOverTokens(input.summary.weighted_norm, input.summary.tokens);
}

}  // namespace

const ScoreMethod kReap = {"reap", "mean of w |f|", StatsLevel::kRouted, Score};

}  // namespace winnow
