// SEER-MoE, arXiv 2404.05089, soft counting: the sum of the routing weights an expert
// gets. Weights are the family's own (renormalised over the k in use where it does).
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return input.summary.weight;
}

}  // namespace

const ScoreMethod kSeer = {"seer", "sum of w", StatsLevel::kRouting, Score};

}  // namespace winnow
