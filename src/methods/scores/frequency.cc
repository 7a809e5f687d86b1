// Hard counting: how many tokens use the expert, |A_e|. The baseline of every paper on pruning
// experts.
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return {input.summary.tokens.begin(), input.summary.tokens.end()};
}

}  // namespace

const ScoreMethod kFrequency = {"frequency", "tokens that use the expert", StatsLevel::kRouting,
                                Score};

}  // namespace winnow
