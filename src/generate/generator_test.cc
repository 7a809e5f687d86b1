// Generation: greedy continuations of the reference, and the sampler's rules.
#include "generate/generator.h"

#include <gtest/gtest.h>

#include <set>

#include "base/error.h"
#include "forward/test_support.h"

namespace winnow {
namespace {

constexpr uint64_t kAmpleBytes = uint64_t{1} << 40;

std::vector<int32_t> Continue(const Model& model, const std::vector<int32_t>& prompt,
                              GenerateOptions options, int threads = 1,
                              std::optional<bool> resident = {}) {
  options.memory_budget_bytes = kAmpleBytes;
  ThreadPool pool(threads);
  GeneratePlan plan = PlanGenerate(
      model, static_cast<int64_t>(prompt.size()) + options.max_new_tokens, options, threads);
  if (resident) plan.resident = *resident;
  std::vector<int32_t> seen;
  const GenerateResult result = Generate(model, prompt, options, plan, pool, {}, [&](int32_t id) {
    seen.push_back(id);
    return true;
  });
  EXPECT_EQ(seen, result.tokens);
  return result.tokens;
}

class GoldenGenerate : public testing::TestWithParam<const char*> {
 protected:
  const Model model_ = Model::Open(GoldenFolder(GetParam()));
  const SafetensorsFile values_ = GoldenValues(GetParam());
  const std::vector<int32_t> prompt_ = ReadIntegers(values_, "gen.prompt");
  const std::vector<int32_t> expected_ = ReadIntegers(values_, "gen.tokens");
};

TEST_P(GoldenGenerate, GreedyTokensAreTheReferences) {
  const GenerateOptions options{.max_new_tokens = 16, .stop_at_eos = false};
  EXPECT_EQ(Continue(model_, prompt_, options), expected_);
  EXPECT_EQ(Continue(model_, prompt_, options, 3), expected_);
  EXPECT_EQ(Continue(model_, prompt_, options, 2, false), expected_);  // a layer at a time
}

INSTANTIATE_TEST_SUITE_P(, GoldenGenerate,
                         testing::Values("mixtral", "mixtral-bf16-sharded", "mixtral-bf16-fused",
                                         "qwen2_moe", "qwen3_moe-bf16", "qwen3_moe-dense-layer",
                                         "olmoe", "deepseek-bf16"),
                         TestName);

class GenerateTest : public testing::Test {
 protected:
  const Model model_ = Model::Open(GoldenFolder("mixtral"));
  const SafetensorsFile values_ = GoldenValues("mixtral");
  const std::vector<int32_t> prompt_ = ReadIntegers(values_, "gen.prompt");
  const std::vector<int32_t> expected_ = ReadIntegers(values_, "gen.tokens");
};

TEST_F(GenerateTest, StopsWhereItShould) {
  GenerateOptions options{.max_new_tokens = 3, .stop_at_eos = false};
  EXPECT_EQ(Continue(model_, prompt_, options),
            std::vector<int32_t>(expected_.begin(), expected_.begin() + 3));
  // When the caller has enough.
  options.max_new_tokens = 16;
  options.memory_budget_bytes = kAmpleBytes;
  ThreadPool pool(1);
  const GeneratePlan plan = PlanGenerate(model_, 5, options, 1);
  int calls = 0;
  const GenerateResult result =
      Generate(model_, prompt_, options, plan, pool, {}, [&](int32_t) { return ++calls < 5; });
  EXPECT_EQ(result.tokens.size(), 5u);
  // At the end of the text, whose token is not part of the result.
  const TestFolder folder;
  const fs::path copy = CopyFolder(GoldenFolder("mixtral"), folder.path() / "model");
  EditConfig(copy, [&](OrderedJson& config) { config["eos_token_id"] = {300, expected_[4]}; });
  const auto first = std::find(expected_.begin(), expected_.end(), expected_[4]);
  options.stop_at_eos = true;
  EXPECT_EQ(Continue(Model::Open(copy), prompt_, options),
            std::vector<int32_t>(expected_.begin(), first));
}

TEST_F(GenerateTest, APromptThatGoesOnIsNotReadAgain) {
  const GenerateOptions options{
      .max_new_tokens = 5, .stop_at_eos = false, .memory_budget_bytes = kAmpleBytes};
  ThreadPool pool(2);
  const auto keep = [](int32_t) { return true; };
  for (const bool resident : {true, false}) {
    GeneratePlan plan = PlanGenerate(model_, 64, options, 2);
    plan.resident = resident;
    Generator generator(model_, 64, options, plan, pool, {});
    const GenerateResult first = generator.Run(prompt_, keep);
    EXPECT_EQ(first.cached_tokens, 0);
    std::vector<int32_t> longer = prompt_;
    longer.insert(longer.end(), first.tokens.begin(), first.tokens.end());
    longer.push_back(7);
    const GenerateResult second = generator.Run(longer, keep);
    EXPECT_EQ(second.cached_tokens, static_cast<int64_t>(prompt_.size()));
    EXPECT_EQ(second.tokens, Continue(model_, longer, options));
    // Another beginning, and the same prompt once more.
    const std::vector<int32_t> other = {9, 8, 7};
    EXPECT_EQ(generator.Run(other, keep).tokens, Continue(model_, other, options));
    const GenerateResult again = generator.Run(other, keep);
    EXPECT_EQ(again.cached_tokens, 2);
    EXPECT_EQ(again.tokens, Continue(model_, other, options));
    EXPECT_THROW(generator.Run(std::vector<int32_t>(64, 1), keep), UsageError);
  }
}

TEST_F(GenerateTest, IdsWithoutATokenAreNeverSampled) {
  const int32_t first = expected_[0];
  ASSERT_GT(first, 0);
  const std::vector<int32_t> tokens = Continue(
      model_, prompt_, {.max_new_tokens = 16, .vocabulary_limit = first, .stop_at_eos = false});
  ASSERT_EQ(tokens.size(), 16u);
  for (const int32_t token : tokens) EXPECT_LT(token, first);
}

TEST_F(GenerateTest, LongPromptsGoThroughInPieces) {
  // 1,100 tokens: three pieces. The next token is the one the whole pass prefers.
  TokenSet tokens;
  std::vector<int32_t> prompt;
  for (int i = 0; i < 1100; ++i) prompt.push_back((i * i + 7 * i) % 320);
  tokens.Append(prompt);
  const ForwardTrace trace = RunForward(model_, tokens, {.logits = false});
  std::vector<float> logits(320);
  ThreadPool pool(1);
  ComputeLogits(model_, pool, trace.hidden.data() + 1099 * 64, 1, logits.data());
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  EXPECT_EQ(Continue(model_, prompt, {.max_new_tokens = 1, .stop_at_eos = false}),
            (std::vector<int32_t>{static_cast<int32_t>(best)}));
}

TEST_F(GenerateTest, SameSeedSameText) {
  const auto sample = [&](uint64_t seed) {
    return Continue(model_, prompt_,
                    {.sampling = {.temperature = 1.5f, .seed = seed},
                     .max_new_tokens = 16,
                     .stop_at_eos = false},
                    2);
  };
  EXPECT_EQ(sample(1), sample(1));
  EXPECT_NE(sample(1), sample(2));
}

TEST_F(GenerateTest, RefusesEmptyPromptsAndBrokenWeights) {
  EXPECT_THROW(Continue(model_, {}, {}), UsageError);
  EXPECT_THROW(Continue(model_, {320}, {}), UsageError);
  GenerateOptions options{.memory_budget_bytes = 1 << 20};
  EXPECT_THROW(PlanGenerate(model_, 5, options, 1), ResourceError);
  const TestFolder folder;
  const fs::path copy = CopyFolder(GoldenFolder("mixtral"), folder.path() / "model");
  {
    const Model model = Model::Open(copy);
    const TensorInfo& norm = *model.final_norm().tensor;
    const float nan = NAN;
    File::OpenWrite(copy / "model.safetensors")
        .WriteAt(norm.file_offset, std::as_bytes(std::span(&nan, 1)));
  }
  EXPECT_THROW(Continue(Model::Open(copy), prompt_, {.max_new_tokens = 4}), ModelError);
}

TEST(Sampler, GreedyTakesTheLowestOfEqualIds) {
  uint64_t state = 42;
  const std::vector<float> logits = {1, 5, 5, 2};
  EXPECT_EQ(SampleToken(logits, {.temperature = 0}, state), 1);
  EXPECT_EQ(state, 42u);  // no draw
  EXPECT_EQ(SampleToken(logits, {.temperature = 1, .top_k = 1}, state), 1);
}

// Ids drawn in 2,000 tries and how often.
std::map<int32_t, int> Draws(const std::vector<float>& logits, const SamplingOptions& options) {
  std::map<int32_t, int> counts;
  uint64_t state = options.seed;
  for (int i = 0; i < 2000; ++i) ++counts[SampleToken(logits, options, state)];
  return counts;
}

TEST(Sampler, TopKAndTopPLimitTheCandidates) {
  // Probabilities 0.4, 0.3, 0.2, 0.1 in shuffled order.
  const std::vector<float> logits = {std::log(0.2f), std::log(0.4f), std::log(0.1f),
                                     std::log(0.3f)};
  const auto ids = [&](const SamplingOptions& options) {
    std::set<int32_t> set;
    for (const auto& [id, count] : Draws(logits, options)) set.insert(id);
    return set;
  };
  EXPECT_EQ(ids({.temperature = 1}), (std::set<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(ids({.temperature = 1, .top_k = 2}), (std::set<int32_t>{1, 3}));
  EXPECT_EQ(ids({.temperature = 1, .top_k = 100}), (std::set<int32_t>{0, 1, 2, 3}));
  // The smallest set that reaches 0.65, and 0.75.
  EXPECT_EQ(ids({.temperature = 1, .top_p = 0.65f}), (std::set<int32_t>{1, 3}));
  EXPECT_EQ(ids({.temperature = 1, .top_p = 0.75f}), (std::set<int32_t>{0, 1, 3}));
  EXPECT_EQ(ids({.temperature = 1, .top_p = 1e-6f}), (std::set<int32_t>{1}));
  // top_p of what top_k left: 0.57 of {0.4, 0.3} is the first alone, 0.58 both.
  EXPECT_EQ(ids({.temperature = 1, .top_k = 2, .top_p = 0.57f}), (std::set<int32_t>{1}));
  EXPECT_EQ(ids({.temperature = 1, .top_k = 2, .top_p = 0.58f}), (std::set<int32_t>{1, 3}));
}

TEST(Sampler, DrawsFollowTheProbabilities) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  const std::map<int32_t, int> counts = Draws(logits, {.temperature = 1, .seed = 9});
  // 2,000 draws: standard deviation at most 22.
  EXPECT_NEAR(counts.at(0), 400, 100);
  EXPECT_NEAR(counts.at(1), 1000, 100);
  EXPECT_NEAR(counts.at(2), 600, 100);
  // Half the temperature squares them: 0.04, 0.25, 0.09 of 0.38.
  const std::map<int32_t, int> cold = Draws(logits, {.temperature = 0.5f, .seed = 9});
  EXPECT_NEAR(cold.at(1), 2000 * 0.25 / 0.38, 100);
  EXPECT_EQ(Draws(logits, {.temperature = 1, .seed = 9}), counts);
}

TEST(Sampler, ExtremeScoresStayFinite) {
  const std::vector<float> logits = {-3e38f, 3e38f, 0, -INFINITY};
  for (const auto& [id, count] : Draws(logits, {.temperature = 0.01f})) EXPECT_EQ(id, 1);
}

}  // namespace
}  // namespace winnow
