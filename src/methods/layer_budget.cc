#include "methods/layer_budget.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "base/error.h"

namespace winnow {

std::vector<int64_t> DivideSurvivors(const std::vector<std::vector<double>>& costs, int64_t total) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const size_t num_layers = costs.size();
  const auto width = static_cast<size_t>(total) + 1;
  // least[l][n]: of layers l and above with n survivors among them.
  std::vector<std::vector<double>> least(num_layers + 1, std::vector<double>(width, kInfinity));
  std::vector<std::vector<int64_t>> choice(num_layers, std::vector<int64_t>(width, -1));
  least[num_layers][0] = 0;
  for (size_t l = num_layers; l-- > 0;) {
    for (size_t n = 0; n < width; ++n) {
      // From many to few, so that the first of equals has more.
      for (size_t r = std::min(costs[l].size() - 1, n) + 1; r-- > 0;) {
        const double cost = costs[l][r] + least[l + 1][n - r];
        if (cost < least[l][n]) {
          least[l][n] = cost;
          choice[l][n] = static_cast<int64_t>(r);
        }
      }
    }
  }
  if (!std::isfinite(least[0][width - 1])) {
    throw UsageError(
        fmt::format("no division of {} survivors over {} layers is allowed", total, num_layers),
        "keep more experts, or lower --floor");
  }
  std::vector<int64_t> survivors;
  auto left = static_cast<size_t>(total);
  for (size_t l = 0; l < num_layers; ++l) {
    survivors.push_back(choice[l][left]);
    left -= static_cast<size_t>(survivors.back());
  }
  return survivors;
}

}  // namespace winnow
