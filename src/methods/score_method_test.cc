// Scores against their definitions, from the outputs of a traced run.
#include "methods/score_method.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/dtype.h"
#include "base/error.h"
#include "methods/naee.h"
#include "observe/test_support.h"
#include "weights/layer_reader.h"

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
          squared(experts), turning(experts);
      for (size_t t = 0; t < static_cast<size_t>(tokens.num_tokens()); ++t) {
        const float* logits = traced.router_logits.data() + t * experts;
        std::vector<size_t> order(experts);
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return logits[a] > logits[b]; });
        const auto k = static_cast<size_t>(config.num_experts_per_tok);
        double before = 0, after = 0, along = 0;  // |h|^2, |h + z|^2, h . (h + z)
        for (size_t c = 0; c < h; ++c) {
          const auto stream = static_cast<double>(traced.residual[t * h + c]);
          const double moved = stream + static_cast<double>(traced.routed[t * h + c]);
          before += stream * stream;
          after += moved * moved;
          along += stream * moved;
        }
        const double turn = std::max(0.0, 1 - along / std::sqrt(before * after));
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
          turning[e] += turn * w * std::sqrt(squares);
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
      // One text: its scores add up to 1.
      const double total = std::accumulate(turning.begin(), turning.end(), 0.0);
      for (double& value : turning) value /= total;
      expect(kEasyEp, turning, false);
    }
  }
}

// From the weights alone, by definition.
TEST(Scores, AimerIsMeanOverRootMeanSquareOfTheWeights) {
  const TestFolder folder;
  const Model model = Model::Open(GoldenFolder("olmoe"));
  const fs::path stats = folder.path() / "stats";
  Observe(model, {SourceOf("golden", GoldenTokens("olmoe"))}, {.level = StatsLevel::kRouting},
          stats);
  const StatsInfo info = ReadStatsInfo(stats);
  LayerReader reader(model, {});
  ThreadPool pool(1);
  size_t next = 0;
  for (int64_t l = 0; l < info.num_layers; ++l) {
    const LayerWeights& weights = reader.Get(l);
    if (weights.experts.empty()) continue;
    const StatsLayer& layer = info.layers[next++];
    const LayerStatsReader records(stats, info, layer);
    const ExpertSummary summary = SummarizeExperts(records, info, layer);
    const std::vector<double> scores =
        kAimer.score({records, info, layer, summary, uint64_t{1} << 30, pool, {}});
    for (size_t e = 0; e < weights.experts.size(); ++e) {
      double sum = 0, squares = 0, count = 0;
      const FeedForwardWeights& expert = weights.experts[e];
      for (const WeightMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
        for (int64_t i = 0; i < matrix->rows * matrix->cols; ++i) {
          const auto w =
              static_cast<double>(LoadAsFloat(matrix->dtype, matrix->data, static_cast<size_t>(i)));
          sum += std::abs(w);
          squares += w * w;
          ++count;
        }
      }
      EXPECT_NEAR(scores[e], -(sum / count) / std::sqrt(squares / count), 1e-6);
    }
  }
}

// A mix multiplies sums: without one text, what the other alone gives; a mask likewise, by token.
TEST(Scores, MixesAndMasksLeaveOutWhatTheySay) {
  const TestFolder folder;
  const Model model = Model::Open(GoldenFolder("olmoe"));
  const TokenSet tokens = GoldenTokens("olmoe");
  const SourceBlocks all = SourceOf("all", tokens);
  SourceBlocks first{"first", {}}, second{"second", {}};
  const int64_t half = tokens.num_sequences() / 2, cut = tokens.offsets[static_cast<size_t>(half)];
  ASSERT_GT(half, 0);
  for (int64_t i = 0; i <= tokens.num_sequences(); ++i) {
    const int64_t offset = tokens.offsets[static_cast<size_t>(i)];
    if (i <= half) first.sequences.offsets.push_back(offset);
    if (i >= half) second.sequences.offsets.push_back(offset - cut);
  }
  first.sequences.ids.assign(tokens.ids.begin(), tokens.ids.begin() + cut);
  second.sequences.ids.assign(tokens.ids.begin() + cut, tokens.ids.end());
  SourceBlocks masked = all;
  masked.sequences.weights.assign(tokens.ids.size(), 0.0f);
  std::fill_n(masked.sequences.weights.begin(), cut, 1.0f);

  const ObserveOptions options{.level = StatsLevel::kFull, .batch = half};
  Observe(model, {first}, options, folder.path() / "first");
  Observe(model, {first, second}, options, folder.path() / "both");
  Observe(model, {masked}, options, folder.path() / "masked");
  const StatsInfo alone = ReadStatsInfo(folder.path() / "first");
  StatsInfo mixed = ReadStatsInfo(folder.path() / "both");
  mixed.sources[1].mix = 0;
  const StatsInfo by_mask = ReadStatsInfo(folder.path() / "masked");
  EXPECT_TRUE(by_mask.token_weights);
  ThreadPool pool(1);
  for (size_t i = 0; i < alone.layers.size(); ++i) {
    const StatsLayer& layer = alone.layers[i];
    const auto answers = [&](const char* name, const StatsInfo& info) {
      const LayerStatsReader records(folder.path() / name, info, layer);
      const ExpertSummary summary = SummarizeExperts(records, info, layer);
      std::vector<double> numbers;
      for (const ScoreMethod* method : {&kFrequency, &kReap, &kEasyEp, &kLeaveOneOut}) {
        const std::vector<double> scores =
            method->score({records, info, layer, summary, uint64_t{1} << 30, pool, {}});
        numbers.insert(numbers.end(), scores.begin(), scores.end());
      }
      for (const SubsetSearch search : {SubsetSearch::kEnumerate, SubsetSearch::kEliminate}) {
        const LayerPlan plan = ChooseNaee(
            records, info, layer, {.keep = layer.num_experts - 2, .search = search}, pool, {});
        numbers.insert(numbers.end(), plan.kept.begin(), plan.kept.end());
        numbers.push_back(*plan.loss);
      }
      return numbers;
    };
    const std::vector<double> expected = answers("first", alone);
    for (const auto& [name, info] :
         {std::pair<const char*, const StatsInfo*>("both", &mixed), {"masked", &by_mask}}) {
      const std::vector<double> got = answers(name, *info);
      ASSERT_EQ(got.size(), expected.size());
      for (size_t n = 0; n < got.size(); ++n) {
        // The same sums, in batches that a text's end may cut elsewhere.
        EXPECT_NEAR(got[n], expected[n], 1e-9 * (1 + std::abs(expected[n]))) << name << " " << n;
      }
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
