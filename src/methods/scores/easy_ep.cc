// EASY-EP, arXiv 2504.06792: sum over the tokens that use the expert of w |f| max(0, 1 - cos(h, h +
// z)), h the residual stream before the routed experts and z what they add: outputs count where
// they turn the stream. Each source's scores of a layer are divided by their sum before they are
// added, so that no domain outweighs another; --mix weighs the sources after that.
#include <numeric>

#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  std::vector<double> score(static_cast<size_t>(input.layer.num_experts));
  for (size_t s = 0; s < input.summary.turning_norm.size(); ++s) {
    const std::vector<double>& of_source = input.summary.turning_norm[s];
    const double total = std::accumulate(of_source.begin(), of_source.end(), 0.0);
    if (!(total > 0)) continue;
    for (size_t e = 0; e < score.size(); ++e) {
      score[e] += input.info.sources[s].mix * of_source[e] / total;
    }
  }
  return score;
}

}  // namespace

const ScoreMethod kEasyEp = {"easy-ep", "sum of w |f| (1 - cos(h, h + z))", StatsLevel::kRouted,
                             Score};

}  // namespace winnow
