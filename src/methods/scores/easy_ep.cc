// EASY-EP, arXiv 2504.06792: sum over the tokens that use the expert of w |f| max(0, 1 - cos(h, h +
// z)), h the residual stream before the routed experts and z what they add: outputs count where
// they turn the stream. Each source's scores of a layer are divided by their sum before they are
// added, so that no domain outweighs another; --mix weighs the sources after that.
#include <map>
#include <numeric>
#include <string>

#include "methods/score_method.h"

namespace winnow {
namespace {

std::vector<double> Score(const ScoreInput& input) {
  const auto experts = static_cast<size_t>(input.layer.num_experts);
  // Parts of one text, observed in rounds, have one name and are one text.
  struct Text {
    std::vector<double> sums;
    double mix = 1;
  };
  std::map<std::string, Text> texts;
  for (size_t s = 0; s < input.summary.turning_norm.size(); ++s) {
    Text& text = texts[input.info.sources[s].name];
    text.sums.resize(experts);
    text.mix = input.info.sources[s].mix;
    for (size_t e = 0; e < experts; ++e) text.sums[e] += input.summary.turning_norm[s][e];
  }
  std::vector<double> score(experts);
  for (const auto& [name, text] : texts) {
    const double total = std::accumulate(text.sums.begin(), text.sums.end(), 0.0);
    if (!(total > 0)) continue;
    for (size_t e = 0; e < experts; ++e) score[e] += text.mix * text.sums[e] / total;
  }
  return score;
}

}  // namespace

const ScoreMethod kEasyEp = {"easy-ep", "sum of w |f| (1 - cos(h, h + z))", StatsLevel::kRouted,
                             Score};

}  // namespace winnow
