// Skipping thresholds against the published program's medians, and budgets against the definition.
#include "methods/naee_skip.h"

#include <gtest/gtest.h>

#include <cmath>

#include "forward/expert_skipping.h"
#include "forward/router.h"
#include "observe/test_support.h"

namespace winnow {
namespace {

TEST(NaeeSkip, MedianIsThePublishedOne) {
  const Model model = Model::Open(fs::path(WINNOW_TEST_DATA) / "naee" / "tiny");
  const SafetensorsFile file =
      SafetensorsFile::Open(fs::path(WINNOW_TEST_DATA) / "text" / "naee-ids.safetensors");
  const TokenSet tokens =
      TokensOf(ReadIntegers(file, "tiny"), static_cast<int64_t>(file.Get("tiny").shape[0]));
  const TestFolder folder;
  Observe(model, {SourceOf("mix", tokens)}, {.level = StatsLevel::kRouting},
          folder.path() / "stats");
  const StatsInfo info = ReadStatsInfo(folder.path() / "stats");
  ThreadPool pool(1);
  const auto plans = ChooseNaeeSkip(folder.path() / "stats", info, {}, pool, {});
  ASSERT_FALSE(plans.empty());
  // Of layer 0, by the published program in f32.
  EXPECT_NEAR(plans[0].beta.value(), 0.5799930393695831, 0.58e-5);
  EXPECT_EQ(std::ssize(plans[0].kept), plans[0].num_experts);
}

class NaeeSkipBudget : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    Observe(model_, {SourceOf("golden", tokens_)}, {.level = StatsLevel::kFull}, stats_);
    info_ = ReadStatsInfo(stats_);
  }
  const Model model_ = Model::Open(GoldenFolder(GetParam()));
  const TokenSet tokens_ = GoldenTokens(GetParam());
  const TestFolder folder_;
  const fs::path stats_ = folder_.path() / "stats";
  StatsInfo info_;
};

TEST_P(NaeeSkipBudget, SpendsWhatIsAskedAndPredictsTheError) {
  const int64_t k = info_.num_experts_per_tok, n = tokens_.num_tokens();
  const double target = static_cast<double>(k) - 0.4;
  ThreadPool pool(2);
  const auto plans = ChooseNaeeSkip(stats_, info_, SkipBudget{.active_experts = target}, pool, {});
  ForwardTrace trace = RunForward(model_, tokens_, {.watch = Watch::kExpertOutputs});
  const int64_t h = model_.config().hidden_size;
  int64_t active = 0;
  for (size_t i = 0; i < plans.size(); ++i) {
    const TracedLayer& traced = trace.layers.at(plans[i].layer);
    const int64_t experts = plans[i].num_experts;
    TokenRecords records;
    LayerStatsReader(stats_, info_, info_.layers[i]).ReadTokens(0, n, records);
    std::vector<int32_t> ids(static_cast<size_t>(k));
    std::vector<float> weights(ids.size());
    double error = 0;
    for (int64_t t = 0; t < n; ++t) {
      SelectExperts(model_.config(), traced.router_logits.data() + t * experts, 1, experts,
                    ids.data(), weights.data(), plans[i].beta.value());
      double squared = 0;
      for (int64_t c = 0; c < h; ++c) {
        double z = static_cast<double>(traced.routed[static_cast<size_t>(t * h + c)]);
        for (size_t r = 0; r < ids.size(); ++r) {
          if (winnow::IsSkipped(ids[r])) continue;
          z -= static_cast<double>(weights[r]) *
               static_cast<double>(
                   traced.expert_outputs[static_cast<size_t>((t * experts + ids[r]) * h + c)]);
        }
        squared += z * z;
      }
      error += squared / static_cast<double>(records.stream_norm_squared[static_cast<size_t>(t)]);
      for (const int32_t id : ids) active += winnow::IsSkipped(id) ? 0 : 1;
    }
    error /= static_cast<double>(n);
    // Gram records are f32: differences of them are good to some 1e-6 of the outputs' squares.
    EXPECT_NEAR(plans[i].loss.value(), error, 1e-4 * error + 1e-7) << GetParam() << " " << i;
  }
  const double realised =
      static_cast<double>(active) / static_cast<double>(n) / static_cast<double>(plans.size());
  // Ties at a threshold aside, one token in one layer is all that rounding can cost.
  EXPECT_NEAR(realised, target, 2.0 / static_cast<double>(n)) << GetParam();
}

TEST_P(NaeeSkipBudget, OneQuantileSkipsTheSameShareInEveryLayer) {
  const int64_t k = info_.num_experts_per_tok, n = tokens_.num_tokens();
  ThreadPool pool(2);
  const auto plans = ChooseNaeeSkip(stats_, info_, SkipBudget{.quantile = 0.25}, pool, {});
  const ForwardTrace trace = RunForward(model_, tokens_);
  for (const LayerPlan& plan : plans) {
    std::vector<int32_t> ids(static_cast<size_t>(k * n));
    std::vector<float> weights(ids.size());
    SelectExperts(model_.config(), trace.layers.at(plan.layer).router_logits.data(), n,
                  plan.num_experts, ids.data(), weights.data(), plan.beta.value());
    const auto skipped = std::count_if(ids.begin(), ids.end(), winnow::IsSkipped);
    EXPECT_NEAR(static_cast<double>(skipped), 0.25 * static_cast<double>((k - 1) * n), 1.0);
  }
}

INSTANTIATE_TEST_SUITE_P(, NaeeSkipBudget,
                         testing::Values("mixtral", "olmoe", "qwen2_moe", "deepseek-bf16"),
                         [](const auto& name) {
                           std::string text = name.param;
                           std::replace(text.begin(), text.end(), '-', '_');
                           return text;
                         });

TEST(NaeeSkip, RefusesWhatItCannotDo) {
  StatsInfo info;
  info.num_experts_per_tok = 1;
  info.sources.resize(1);
  info.sources[0].num_tokens = 10;
  EXPECT_THROW(CheckNaeeSkip(info, {}), UsageError);
  info.num_experts_per_tok = 2;
  EXPECT_NO_THROW(CheckNaeeSkip(info, {}));
  EXPECT_THROW(CheckNaeeSkip(info, SkipBudget{.active_experts = 2.5}), UsageError);
  info.level = StatsLevel::kRouting;
  EXPECT_THROW(CheckNaeeSkip(info, SkipBudget{.active_experts = 1.5}), UsageError);
}

TEST(SelectExperts, SkipsStrictlyBelowBetaAndRenormalises) {
  ModelConfig config;
  config.num_experts_per_tok = 2;
  config.norm_topk_prob = true;
  // Probabilities in the ratios 4 : 2 : 1.
  const std::vector<float> logits = {std::log(2.0f), std::log(4.0f), 0.0f};
  std::vector<int32_t> ids(2);
  std::vector<float> weights(2);
  float dropped = -1;
  SelectExperts(config, logits.data(), 1, 3, ids.data(), weights.data(), 0.6, &dropped);
  EXPECT_EQ(ids, (std::vector<int32_t>{1, SkippedSlot(0)}));
  EXPECT_TRUE(winnow::IsSkipped(ids[1]));  // although it is expert 0
  EXPECT_EQ(ExpertOfSlot(ids[1]), 0);
  EXPECT_EQ(weights, (std::vector<float>{1.0f, 0.0f}));
  EXPECT_NEAR(dropped, 2.0f / 6, 1e-6f);
  SelectExperts(config, logits.data(), 1, 3, ids.data(), weights.data(), 0.4, &dropped);
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 0}));
  EXPECT_NEAR(weights[0], 2.0f / 3, 1e-6f);
  EXPECT_EQ(dropped, 0);
  config.norm_topk_prob = false;
  SelectExperts(config, logits.data(), 1, 3, ids.data(), weights.data(), 0.6, &dropped);
  EXPECT_NEAR(weights[0], 4.0f / 7, 1e-6f);
}

}  // namespace
}  // namespace winnow
