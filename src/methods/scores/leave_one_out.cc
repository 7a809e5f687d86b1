// The exact loss of the layer's output with this expert alone removed, by NAEE's objective
// (naee.h): what enumeration would say of keep = E - 1, used as a score for any keep.
#include "methods/naee_search.h"
#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  return RemovalLosses(input.records, input.info, input.layer, input.memory_budget_bytes,
                       input.pool, input.control);
}

}  // namespace

const ScoreMethod kLeaveOneOut = {"leave-one-out", "loss without the expert", StatsLevel::kFull,
                                  Score};

}  // namespace winnow
