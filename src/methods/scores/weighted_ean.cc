// The sum of w |f|: REAP times frequency, the expert's whole contribution to the layer's output.
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return input.summary.weighted_norm;
}

}  // namespace

const ScoreMethod kWeightedEan = {"weighted-ean", "sum of w |f|", StatsLevel::kRouted, Score};

}  // namespace winnow
