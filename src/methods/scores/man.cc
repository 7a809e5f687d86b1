// MAN, arXiv 2606.15716: the mean output norm over the tokens that use the expert.
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return MeanOverTokens(input.summary.norm, input.summary.tokens);
}

}  // namespace

const ScoreMethod kMan = {"man", "mean of |f|", StatsLevel::kRouted, Score};

}  // namespace winnow
