// EAN, the sum of output norms over the tokens that use the expert, as tracked beside REAP (arXiv
// 2510.13999).
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return input.summary.norm;
}

}  // namespace

const ScoreMethod kEan = {"ean", "sum of |f|", StatsLevel::kRouted, Score};

}  // namespace winnow
