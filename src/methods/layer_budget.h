// Different numbers of survivors in different layers under one total (plan --budget uneven): each
// layer's least error for every number of survivors, relative to the residual stream so that layers
// compare, and the division of the total that adds up to the least, by dynamic programming.
#pragma once

#include <cstdint>
#include <vector>

namespace winnow {

// costs[l][r]: error of layer l with r survivors, r from 0 to its number of experts; infinite where
// r is not allowed. The survivors of each layer that add up to `total` at the least cost; of equal
// divisions the one with more survivors in lower layers. UsageError if no division is allowed.
std::vector<int64_t> DivideSurvivors(const std::vector<std::vector<double>>& costs, int64_t total);

}  // namespace winnow
