#include "methods/layer_budget.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <numeric>
#include <random>

#include "base/error.h"

namespace winnow {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(DivideSurvivors, IsTheBestOfAllDivisions) {
  std::mt19937 random(3);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::vector<double>> costs;
    for (int l = 0; l < 4; ++l) {
      std::vector<double> cost = {kInfinity, kInfinity};  // at least two survivors
      for (int r = 2; r <= 6; ++r) cost.push_back(static_cast<double>(random() % 1000));
      costs.push_back(cost);
    }
    constexpr int64_t kTotal = 15;
    double best = kInfinity;
    const std::function<void(size_t, int64_t, double)> visit = [&](size_t l, int64_t left,
                                                                   double sum) {
      if (l == costs.size()) {
        if (left == 0) best = std::min(best, sum);
        return;
      }
      for (int64_t r = 0; r <= std::min<int64_t>(left, 6); ++r) {
        visit(l + 1, left - r, sum + costs[l][static_cast<size_t>(r)]);
      }
    };
    visit(0, kTotal, 0);
    const std::vector<int64_t> found = DivideSurvivors(costs, kTotal);
    EXPECT_EQ(std::accumulate(found.begin(), found.end(), int64_t{0}), kTotal);
    double sum = 0;
    for (size_t l = 0; l < costs.size(); ++l) sum += costs[l][static_cast<size_t>(found[l])];
    EXPECT_EQ(sum, best);
  }
}

TEST(DivideSurvivors, LowerLayersGetMoreOfEquals) {
  EXPECT_EQ(DivideSurvivors({{0, 0, 0}, {0, 0, 0}}, 3), (std::vector<int64_t>{2, 1}));
}

TEST(DivideSurvivors, RefusesWhatNoDivisionReaches) {
  EXPECT_THROW(DivideSurvivors({{kInfinity, 1}, {kInfinity, 1}}, 3), UsageError);
  EXPECT_THROW(DivideSurvivors({{kInfinity, kInfinity, 0}, {kInfinity, kInfinity, 0}}, 3),
               UsageError);
}

}  // namespace
}  // namespace winnow
