// AIMER, arXiv 2603.18492: from the weights alone, without any text. mean |w| / rms w over all
// elements of an expert's gate, up and down projection says how flat its weights are; the flattest
// go first.
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  std::vector<double> score = input.records.WeightFlatness();
  for (double& s : score) s = -s;
  return score;
}

}  // namespace

const ScoreMethod kAimer = {"aimer", "- mean |w| / rms w of the weights", StatsLevel::kRouting,
                            Score};

}  // namespace winnow
