// The rule for experts with huge activations, on numbers made by hand; and that no method drops
// one.
#include "methods/super_experts.h"

#include <gtest/gtest.h>

#include "methods/naee.h"
#include "methods/naee_search.h"
#include "methods/score_method.h"
#include "observe/test_support.h"

namespace winnow {
namespace {

StatsInfo TwoLayers() {
  StatsInfo info;
  info.layers = {{1, 4, 1}, {3, 4, 1}};
  return info;
}

TEST(SuperExperts, AreFarAboveTheirLayerAndAllOthers) {
  const auto found = SuperExpertsOf(TwoLayers(), {{1, 2, 3, 2}, {2, 500, 3, 4}});
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found[0].layer, 3);
  EXPECT_EQ(found[0].expert, 1);
  EXPECT_EQ(found[0].largest, 500);
  EXPECT_NEAR(found[0].times_median, 500 / 3.5, 1e-9);
  EXPECT_EQ(Guarded(found), (GuardedExperts{{3, {1}}}));
}

TEST(SuperExperts, OrdinaryModelsHaveNone) {
  EXPECT_TRUE(SuperExpertsOf(TwoLayers(), {{1, 2, 3, 2}, {2, 9, 3, 4}}).empty());
  EXPECT_TRUE(SuperExpertsOf(TwoLayers(), {{0, 0, 0, 0}, {0, 0, 0, 0}}).empty());
  EXPECT_TRUE(SuperExpertsOf(TwoLayers(), {{}, {}}).empty());
}

// Whatever a method would drop first stays once it is guarded.
TEST(SuperExperts, GuardedExpertsAreNeverDropped) {
  const TestFolder folder;
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const fs::path stats = folder.path() / "stats";
  Observe(model, {SourceOf("golden", GoldenTokens("mixtral"))}, {.level = StatsLevel::kFull},
          stats);
  const StatsInfo info = ReadStatsInfo(stats);
  const StatsLayer& layer = info.layers.front();
  const LayerStatsReader records(stats, info, layer);
  ThreadPool pool(1);
  for (const SubsetSearch search : {SubsetSearch::kEnumerate, SubsetSearch::kEliminate}) {
    NaeeOptions options{.keep = layer.num_experts - 1, .search = search};
    const LayerPlan free = ChooseNaee(records, info, layer, options, pool, {});
    options.guarded[layer.layer] = free.dropped;
    const LayerPlan guarded = ChooseNaee(records, info, layer, options, pool, {});
    ASSERT_EQ(guarded.dropped.size(), 1U);
    EXPECT_NE(guarded.dropped, free.dropped);
    EXPECT_GT(*guarded.loss, *free.loss);
  }
  EXPECT_EQ(HighestScores({3, 2, 1, 0}, 2, {3}), (std::vector<int32_t>{0, 3}));
}

}  // namespace
}  // namespace winnow
