// Scores against their definitions, from the outputs of a traced run.
#include "methods/score_method.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "observe/test_support.h"

namespace winnow {
namespace {

// Records are f32: norms of some dozen numbers, sums of 48 tokens.
constexpr double kLimit = 2e-5;

TEST(Scores, AreTheirDefinitions) {
  for (const char* name : {"mixtral", "olmoe", "qwen2_moe"}) {
    SCOPED_TRACE(name);
    const TestFolder folder;
    const Model model = Model::Open(GoldenFolder(name));
    const ModelConfig& config = model.config();
    const TokenSet tokens = GoldenTokens(name);
    const ForwardTrace trace =
        RunForward(model, tokens, {.watch = Watch::kExpertOutputs, .logits = false});
    const fs::path stats = folder.path() / "stats";
    Observe(model, {SourceOf("golden", tokens)}, {.level = StatsLevel::kFull}, stats);
    const StatsInfo info = ReadStatsInfo(stats);
    ThreadPool pool(1);
    for (const StatsLayer& layer : info.layers) {
      const LayerStatsReader records(stats, info, layer);
      const ExpertSummary got = SummarizeExperts(records, info, layer);
      const TracedLayer& traced = trace.layers.at(layer.layer);
      const auto experts = static_cast<size_t>(layer.num_experts);
      const auto h = static_cast<size_t>(config.hidden_size);
      std::vector<double> count(experts), weight(experts), norm(experts), weighted(experts),
          squared(experts);
      for (size_t t = 0; t < static_cast<size_t>(tokens.num_tokens()); ++t) {
        const float* logits = traced.router_logits.data() + t * experts;
        std::vector<size_t> order(experts);
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return logits[a] > logits[b]; });
        const auto k = static_cast<size_t>(config.num_experts_per_tok);
        double all = 0, used = 0;
        for (size_t i = 0; i < experts; ++i) {
          const double mass = std::exp(static_cast<double>(logits[order[i]]));
          all += mass;
          if (i < k) used += mass;
        }
        for (size_t i = 0; i < k; ++i) {
          const size_t e = order[i];
          const double w =
              std::exp(static_cast<double>(logits[e])) / (config.norm_topk_prob ? used : all);
          double squares = 0;
          for (size_t c = 0; c < h; ++c) {
            const auto f = static_cast<double>(traced.expert_outputs[(t * experts + e) * h + c]);
            squares += f * f;
          }
          ++count[e];
          weight[e] += w;
          norm[e] += std::sqrt(squares);
          weighted[e] += w * std::sqrt(squares);
          squared[e] += squares;
        }
      }
      const ScoreInput input{records, info, layer, got, uint64_t{1} << 30, pool, {}};
      const auto expect = [&](const ScoreMethod& method, const std::vector<double>& sums,
                              bool mean) {
        SCOPED_TRACE(method.name);
        const std::vector<double> scores = method.score(input);
        ASSERT_EQ(scores.size(), experts);
        for (size_t e = 0; e < experts; ++e) {
          const double expected = !mean ? sums[e] : count[e] > 0 ? sums[e] / count[e] : 0.0;
          EXPECT_NEAR(scores[e], expected, kLimit * (1 + expected));
        }
      };
      expect(kFrequency, count, false);
      expect(kSeer, weight, false);
      expect(kEan, norm, false);
      expect(kWeightedEan, weighted, false);
      expect(kReap, weighted, true);
      expect(kMan, norm, true);
      expect(kMsan, squared, true);
    }
  }
}

TEST(Scores, HighestAreKeptAndTiesGoToTheLowerNumber) {
  EXPECT_EQ(HighestScores({1, 3, 2, 3}, 2), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(HighestScores({1, 1, 1, 2}, 2), (std::vector<int32_t>{0, 3}));
  EXPECT_EQ(FindScoreMethod("reap"), &kReap);
  EXPECT_EQ(FindScoreMethod("naee"), nullptr);
}

TEST(Scores, RefuseStatisticsThatLackWhatTheyNeed) {
  StatsInfo info;
  info.num_experts_per_tok = 2;
  info.level = StatsLevel::kRouting;
  info.layers = {{0, 8, 1}};
  EXPECT_NO_THROW(CheckScoreMethod(kFrequency, info, 4));
  EXPECT_THROW(CheckScoreMethod(kReap, info, 4), UsageError);
  info.level = StatsLevel::kRouted;
  EXPECT_NO_THROW(CheckScoreMethod(kReap, info, 4));
  EXPECT_THROW(CheckScoreMethod(kLeaveOneOut, info, 4), UsageError);
  EXPECT_THROW(CheckScoreMethod(kReap, info, 1), UsageError);
  EXPECT_THROW(CheckScoreMethod(kReap, info, 8), UsageError);
}

}  // namespace
}  // namespace winnow
