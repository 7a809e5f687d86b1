#include "quantize/bit_allocation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "base/error.h"

namespace winnow {
namespace {

// Errors that fall by about 4 with every bit, of very unequal experts.
std::vector<AllocationItem> Experts(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::lognormal_distribution<double> scale(0, 1.5);
  std::vector<AllocationItem> items(count);
  for (AllocationItem& item : items) {
    const double size = scale(random);
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      item.bytes.push_back(static_cast<uint64_t>(bits) * 100 + 50);
      item.error.push_back(size * std::pow(0.25 + 0.02 * static_cast<double>(random() % 5), bits));
    }
  }
  return items;
}

double BestOf(const std::vector<AllocationItem>& items, size_t at, uint64_t budget) {
  if (at == items.size()) return 0;
  double best = std::numeric_limits<double>::infinity();
  for (size_t c = 0; c < items[at].bytes.size(); ++c) {
    if (items[at].bytes[c] > budget) continue;
    best = std::min(best, items[at].error[c] + BestOf(items, at + 1, budget - items[at].bytes[c]));
  }
  return best;
}

TEST(AllocateBits, IsNearTheBestOfAllChoices) {
  for (uint32_t seed = 0; seed < 6; ++seed) {
    const std::vector<AllocationItem> items = Experts(6, seed);
    for (const uint64_t budget : {1500u, 1900u, 2550u, 3200u}) {
      const Allocation found = AllocateBits(items, budget);
      EXPECT_LE(found.bytes, budget);
      // Greedy steps leave at most about one step's gain.
      EXPECT_LE(found.error, 1.3 * BestOf(items, 0, budget)) << seed << " " << budget;
    }
  }
}

TEST(AllocateBits, IsNeverWorseThanUniformBits) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const std::vector<AllocationItem> items = Experts(64, seed);
    for (const uint64_t bits : {2u, 3u, 4u, 6u, 8u}) {
      const uint64_t budget = 64 * (bits * 100 + 50);
      const Allocation found = AllocateBits(items, budget);
      EXPECT_LE(found.bytes, budget);
      EXPECT_LE(found.error, found.uniform_error);
      if (bits == 3 || bits == 4) {
        EXPECT_LT(found.error, 0.7 * found.uniform_error) << seed;
      }
    }
  }
}

TEST(AllocateBits, EqualExpertsGetEqualBits) {
  std::vector<AllocationItem> items(8, {{100, 200, 300}, {16, 4, 1}});
  const Allocation found = AllocateBits(items, 1600);
  EXPECT_EQ(found.choice, std::vector<int32_t>(8, 1));
  EXPECT_EQ(found.uniform_choice, 1);
  // What is left for one step goes to the first.
  EXPECT_EQ(AllocateBits(items, 1700).choice.front(), 2);
}

TEST(AllocateBits, TakesTheUniformChoiceWhereGreedyStepsMissIt) {
  // The steepest step spends what the uniform choice needs.
  const std::vector<AllocationItem> items = {{{10, 20, 30}, {100, 99, 50}},
                                             {{10, 20, 30}, {100, 10, 9}}};
  const Allocation found = AllocateBits(items, 40);
  EXPECT_LE(found.error, found.uniform_error);
}

TEST(AllocateBits, RefusesWhatDoesNotFit) {
  const std::vector<AllocationItem> items = {{{10, 20}, {2, 1}}};
  EXPECT_THROW(AllocateBits(items, 9), UsageError);
  EXPECT_TRUE(AllocateBits({}, 0).choice.empty());
}

}  // namespace
}  // namespace winnow
