// Perplexity against the reference's scores, windows against the protocols' definitions, and
// summaries against numbers worked out by hand.
#include "eval/perplexity.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "forward/test_support.h"

namespace winnow {
namespace {

// Mean negative log-likelihoods; the reference's f32 and f64 differ by 2e-6.
constexpr double kNllLimit = 2e-5;
constexpr uint64_t kAmpleBytes = uint64_t{1} << 40;
const fs::path kExamples = fs::path(WINNOW_SOURCE_DIR) / "examples";

PerplexityResult Score(const Model& model, const ScoredWindows& windows, EvalOptions options = {},
                       int threads = 1, std::optional<bool> spill = {}) {
  options.memory_budget_bytes = kAmpleBytes;
  ThreadPool pool(threads);
  EvalPlan plan = PlanPerplexity(model, windows, options, threads);
  if (spill) {
    plan.spill = *spill;
    plan.prefetch = false;
  }
  return RunPerplexity(model, windows, options, plan, pool, {});
}

TokenSequences Rows(const TokenSet& tokens) {
  return {tokens.ids, tokens.offsets};
}

TEST(Perplexity, SampleModelScoresAsTheReferenceSays) {
  const Model model = Model::Open(kExamples / "sample-mixtral");
  const SafetensorsFile file =
      SafetensorsFile::Open(fs::path(WINNOW_TEST_DATA) / "eval" / "sample-mixtral.safetensors");
  const TokenSet tokens = TokensOf(ReadIntegers(file, "input_ids"), 4);
  const std::vector<float> nll = ReadArray<float>(file, "nll");
  const ScoredWindows windows = WindowsOfIds(Rows(tokens));
  EXPECT_EQ(windows.scored, 4 * 127);
  const PerplexityResult result = Score(model, windows, {}, 2);
  ASSERT_EQ(result.window_nll.size(), 4u);
  double total = 0;
  for (size_t w = 0; w < 4; ++w) {
    double sum = 0;
    for (size_t t = 0; t < 127; ++t) sum += double{nll[w * 127 + t]};
    EXPECT_NEAR(result.window_nll[w] / 127, sum / 127, kNllLimit) << w;
    EXPECT_EQ(result.window_tokens[w], 127);
    total += sum;
  }
  EXPECT_NEAR(result.nll, total / (4 * 127), kNllLimit);
  EXPECT_NEAR(result.perplexity, std::exp(total / (4 * 127)), 1e-3);
  EXPECT_FALSE(result.bits_per_byte.has_value());
  // Token by token: a row cut after one more token gains that token's score. (First row, first 12.)
  TokenSet prefixes;
  for (size_t length = 2; length < 14; ++length) {
    prefixes.Append(std::span(tokens.ids).first(length));
  }
  const PerplexityResult cut = Score(model, WindowsOfIds(Rows(prefixes)));
  for (size_t i = 0; i + 1 < cut.window_nll.size(); ++i) {
    EXPECT_NEAR(cut.window_nll[i + 1] - cut.window_nll[i], double{nll[i + 1]}, 5 * kNllLimit) << i;
  }
}

class GoldenPerplexity : public testing::TestWithParam<const char*> {};

TEST_P(GoldenPerplexity, AgreesWithTheReference) {
  const Model model = Model::Open(GoldenFolder(GetParam()));
  const SafetensorsFile values = GoldenValues(GetParam());
  const std::vector<double> expected = ReadArray<double>(values, "nll_per_sequence");
  const PerplexityResult result = Score(model, WindowsOfIds(Rows(GoldenTokens(GetParam()))));
  ASSERT_EQ(result.window_nll.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(result.window_nll[i] / 23, expected[i], kNllLimit);
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenPerplexity,
                         testing::Values("mixtral", "mixtral-bf16-fused", "qwen2_moe",
                                         "qwen3_moe-bf16", "olmoe", "deepseek-bf16"),
                         TestName);

TEST(Perplexity, SameBitsHoweverItRuns) {
  const TestFolder folder;
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  TokenSet tokens;
  const std::vector<int32_t> ids = GoldenTokens("qwen2_moe").ids;
  while (tokens.num_tokens() < kTileTokens + 1) tokens.Append(ids);  // two tiles
  const ScoredWindows windows = WindowsOfIds(Rows(tokens));
  const PerplexityResult one = Score(model, windows);
  EXPECT_EQ(Score(model, windows, {}, 3).window_nll, one.window_nll);
  EXPECT_EQ(Score(model, windows, {.spill_folder = folder.path()}, 2, true).window_nll,
            one.window_nll);
  EXPECT_EQ(Score(model, windows, {}, 2, false).window_nll, one.window_nll);
  EXPECT_TRUE(fs::is_empty(folder.path()));  // the spill file is gone
  // All windows are the same text.
  EXPECT_EQ(one.window_nll.front(), one.window_nll.back());
  // Nothing but the rounding of the mean.
  EXPECT_LT(one.standard_error.value(), 1e-14);
}

// A vocabulary of several chunks: log-sum-exps are combined across them.
TEST(Perplexity, LargeVocabulariesAreScoredInChunks) {
  const TestFolder folder;
  const fs::path copy = CopyFolder(GoldenFolder("mixtral"), folder.path() / "model");
  static constexpr int64_t kVocabulary = 2 * kVocabularyChunk + 1000;
  const auto bytes = static_cast<size_t>(kVocabulary * 64);
  std::vector<float> embedding(bytes), head(bytes);
  uint64_t state = 7;
  for (std::vector<float>* matrix : {&embedding, &head}) {
    for (float& value : *matrix) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      value = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-32f;
    }
  }
  {
    const SafetensorsFile file = SafetensorsFile::Open(copy / "model.safetensors");
    std::vector<TensorData> tensors;
    std::vector<std::vector<std::byte>> data;
    data.reserve(file.tensors().size());
    for (const TensorInfo& tensor : file.tensors()) {
      const bool is_head = tensor.name == "lm_head.weight";
      if (is_head || tensor.name == "model.embed_tokens.weight") {
        tensors.push_back({tensor.name,
                           Dtype::kF32,
                           {static_cast<uint64_t>(kVocabulary), 64},
                           std::as_bytes(std::span(is_head ? head : embedding))});
        continue;
      }
      file.Read(tensor, data.emplace_back(static_cast<size_t>(tensor.bytes)));
      tensors.push_back({tensor.name, tensor.dtype, tensor.shape, data.back()});
    }
    WriteSafetensors(folder.path() / "new.safetensors", tensors);
  }
  fs::rename(folder.path() / "new.safetensors", copy / "model.safetensors");
  EditConfig(copy, [](OrderedJson& config) { config["vocab_size"] = kVocabulary; });
  const Model model = Model::Open(copy);
  TokenSet tokens;
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 40; ++i) ids.push_back(i * 433 % static_cast<int32_t>(kVocabulary));
  tokens.Append(ids);
  const std::vector<float> logits = RunForward(model, tokens).logits;
  double expected = 0;
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    const float* row = logits.data() + t * kVocabulary;
    double sum = 0;
    for (int64_t v = 0; v < kVocabulary; ++v) sum += std::exp(double{row[v]});
    expected += std::log(sum) - double{row[ids[t + 1]]};
  }
  const PerplexityResult result = Score(model, WindowsOfIds(Rows(tokens)));
  // Sums of exponentials in f32 lanes against double.
  EXPECT_NEAR(result.nll, expected / 39, 1e-6);
}

TEST(Perplexity, RefusesIdsOutsideTheVocabulary) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const TokenSequences rows = {{1, 2, 320}, {0, 3}};
  EXPECT_THROW(Score(model, WindowsOfIds(rows)), UsageError);
  EXPECT_THROW(WindowsOfIds({{1, 2}, {0, 1, 2}}), UsageError);  // no row of two tokens
}

TEST(Perplexity, PlansWithinTheBudget) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  TokenSet tokens;
  const std::vector<int32_t> ids = GoldenTokens("mixtral").ids;
  while (tokens.num_tokens() < 3 * kTileTokens) tokens.Append(ids);
  const ScoredWindows windows = WindowsOfIds(Rows(tokens));
  const EvalPlan ample = PlanPerplexity(model, windows, {.memory_budget_bytes = kAmpleBytes}, 1);
  EXPECT_TRUE(ample.prefetch);
  EXPECT_FALSE(ample.spill);
  EXPECT_THROW(PlanPerplexity(model, windows, {.memory_budget_bytes = 1 << 20}, 1), ResourceError);
}

TEST(Summaries, AreTheFormulas) {
  // Windows of 10, 10 and 20 tokens with means 2, 4, 3.
  const PerplexityResult result =
      Summarize(std::vector<double>{20, 40, 60}, std::vector<int64_t>{10, 10, 20}, 50);
  EXPECT_EQ(result.tokens, 40);
  EXPECT_DOUBLE_EQ(result.nll, 3.0);
  EXPECT_DOUBLE_EQ(result.perplexity, std::exp(3.0));
  EXPECT_DOUBLE_EQ(*result.bits_per_byte, 120 / std::log(2.0) / 50);
  // Deviations -1, 1, 0: sqrt(2 / 2 / 3).
  EXPECT_DOUBLE_EQ(result.standard_error.value(), std::sqrt(1.0 / 3));
  const PerplexityResult single = Summarize(std::vector<double>{5}, std::vector<int64_t>{10}, 0);
  EXPECT_EQ(single.standard_error, std::nullopt);
  EXPECT_FALSE(single.bits_per_byte.has_value());
}

TEST(Summaries, PairedDifferences) {
  const std::vector<int64_t> tokens = {10, 10, 10};
  const PerplexityResult a = Summarize(std::vector<double>{10, 20, 30}, tokens, 0);
  const PerplexityResult b = Summarize(std::vector<double>{11, 23, 32}, tokens, 0);
  const PairedDifference difference = Compare(a, b);
  EXPECT_NEAR(difference.nll, 0.2, 1e-15);
  // Differences 0.1, 0.3, 0.2; deviations -0.1, 0.1, 0: sqrt(0.02 / 2 / 3). Far below either own.
  EXPECT_NEAR(difference.standard_error.value(), std::sqrt(0.01 / 3), 1e-15);
  EXPECT_LT(difference.standard_error.value(), a.standard_error.value() / 5);
  EXPECT_NEAR(Compare(b, a).nll, -0.2, 1e-15);
  EXPECT_EQ(Compare(a, a).standard_error, 0.0);
}

class Protocols : public testing::Test {
 protected:
  TextSource Text(const std::string& content) {
    return {.path = folder_.Write("text.txt", content), .share = 1, .name = "text"};
  }
  std::vector<int32_t> Encode(const std::string& text) const {
    return tokenizer_.Encode(text, false);
  }
  std::vector<int32_t> Targets(const ScoredWindows& windows, int64_t w) const {
    const auto begin = windows.targets.begin() + windows.inputs.offsets[static_cast<size_t>(w)];
    return {begin, begin + windows.inputs.length(w)};
  }
  std::vector<int32_t> Inputs(const ScoredWindows& windows, int64_t w) const {
    const auto begin = windows.inputs.ids.begin() + windows.inputs.offsets[static_cast<size_t>(w)];
    return {begin, begin + windows.inputs.length(w)};
  }
  const TestFolder folder_;
  const Tokenizer tokenizer_ = Tokenizer::Load(kExamples / "sample-mixtral");
  const ModelTokens ids_ = {.bos = 1, .eos = 2};
  const std::string first_ = "It was a truth universally acknowledged, that a dog has fleas.";
  const std::string second_ = "Numbers: 12, 144 and 1728.";
};

// Ids the reference found at the start of the same documents.
TEST_F(Protocols, TokensOfBundledTextAreTheReferences) {
  const std::map<std::string, std::vector<int32_t>> expected = {
      {"prose",
       {601, 815, 2088, 634, 1091, 260, 302, 2034, 570, 734, 485, 502, 2648, 293, 1920, 1193}},
      {"code",
       {663, 3445, 343, 584, 483, 3886, 1189, 507, 3445, 3081, 584, 798, 820, 1471, 2223, 739}},
      {"math",
       {1256, 286, 689, 494, 342, 495, 828, 1296, 733, 278, 285, 515, 1114, 340, 1078, 623}}};
  for (const auto& [domain, ids] : expected) {
    const TextSource source =
        ParseTextSource((kExamples / "text" / (domain + ".eval.txt.xz")).string());
    const ScoredWindows plain =
        WindowsOfText(source, "text", tokenizer_, ids_, FindProtocol("plain-512"), 512);
    ASSERT_EQ(plain.inputs.num_tokens(), 512);
    std::vector<int32_t> start = Inputs(plain, 0);
    start.resize(ids.size());
    EXPECT_EQ(start, ids) << domain;
    const ScoredWindows bos =
        WindowsOfText(source, "text", tokenizer_, ids_, FindProtocol("bos-512"), 512);
    start = Targets(bos, 0);
    start.resize(ids.size());
    EXPECT_EQ(start, ids) << domain;
    EXPECT_EQ(bos.scored, 512);
    EXPECT_EQ(plain.scored, 511);
  }
}

TEST_F(Protocols, BosReplacesTheLastTokenOfEachBlock) {
  std::vector<int32_t> ids = Encode(first_);
  ids.push_back(2);
  const std::vector<int32_t> more = Encode(second_);
  ids.insert(ids.end(), more.begin(), more.end());
  ids.push_back(2);
  const TextSource source = Text(first_ + "\n<|endoftext|>\n" + second_ + "\n<|endoftext|>\n");
  const ScoredWindows windows =
      WindowsOfText(source, "text", tokenizer_, ids_, {.name = "bos", .window = 8}, 0);
  const auto count = static_cast<int64_t>(ids.size() / 8);
  ASSERT_GT(count, 2);
  ASSERT_EQ(windows.inputs.num_sequences(), count);
  EXPECT_EQ(windows.scored, 8 * count);
  for (int64_t w = 0; w < count; ++w) {
    const std::vector<int32_t> block(ids.begin() + 8 * w, ids.begin() + 8 * (w + 1));
    EXPECT_EQ(Targets(windows, w), block);
    std::vector<int32_t> input = {1};
    input.insert(input.end(), block.begin(), block.end() - 1);
    EXPECT_EQ(Inputs(windows, w), input);
  }
  // A budget of tokens cuts windows; bytes follow.
  const ScoredWindows cut =
      WindowsOfText(source, "text", tokenizer_, ids_, {.name = "bos", .window = 8}, 17);
  EXPECT_EQ(cut.inputs.num_sequences(), 2);
  EXPECT_GT(cut.bytes, 0u);
  EXPECT_LT(cut.bytes, windows.bytes);
}

TEST_F(Protocols, PlainAndHalfWindows) {
  std::vector<int32_t> ids = Encode(first_);
  const TextSource source = Text(first_);
  const ScoredWindows plain = WindowsOfText(source, "text", tokenizer_, ids_,
                                            {.name = "plain", .window = 8, .bos = false}, 8);
  const std::vector<int32_t> block(ids.begin(), ids.begin() + 8);
  EXPECT_EQ(Inputs(plain, 0), block);
  std::vector<int32_t> target(block.begin() + 1, block.end());
  target.push_back(-1);
  EXPECT_EQ(Targets(plain, 0), target);
  EXPECT_EQ(plain.scored, 7);
  // llama.cpp: the text once, with the tokenizer's own BOS; each chunk's first token becomes BOS,
  // positions from the middle on predict the next.
  const std::vector<int32_t> joined = tokenizer_.Encode(first_, true);
  const ScoredWindows half = WindowsOfText(
      source, "text", tokenizer_, ids_,
      {.name = "half", .window = 8, .bos = true, .half = true, .join_documents = true}, 16);
  ASSERT_EQ(half.inputs.num_sequences(), 2);
  for (int64_t w = 0; w < 2; ++w) {
    std::vector<int32_t> input(joined.begin() + 8 * w, joined.begin() + 8 * (w + 1));
    input[0] = 1;
    EXPECT_EQ(Inputs(half, w), input);
    std::vector<int32_t> scored(8, -1);
    for (size_t j = 4; j + 1 < 8; ++j) scored[j] = input[j + 1];
    EXPECT_EQ(Targets(half, w), scored);
  }
  EXPECT_EQ(half.scored, 2 * 3);
}

TEST_F(Protocols, JoinedDocumentsAreOneText) {
  const TextSource source = Text(first_ + "\n<|endoftext|>\n" + second_ + "\n<|endoftext|>\n");
  const std::vector<int32_t> ids = tokenizer_.Encode(first_ + "\n\n" + second_, true);
  const ScoredWindows windows =
      WindowsOfText(source, "text", tokenizer_, ids_,
                    {.name = "gptq", .window = 16, .bos = false, .join_documents = true}, 0);
  ASSERT_EQ(windows.inputs.num_sequences(), static_cast<int64_t>(ids.size() / 16));
  for (int64_t w = 0; w < windows.inputs.num_sequences(); ++w) {
    EXPECT_EQ(Inputs(windows, w),
              std::vector<int32_t>(ids.begin() + 16 * w, ids.begin() + 16 * (w + 1)));
  }
}

TEST_F(Protocols, Refusals) {
  const TextSource source = Text(first_);
  EXPECT_THROW(FindProtocol("wikitext"), UsageError);
  EXPECT_EQ(AllProtocols().size(), 4u);
  EXPECT_EQ(FindProtocol("gptq-wikitext2-2048").window, 2048);
  EXPECT_THROW(WindowsOfText(source, "text", tokenizer_, ids_, FindProtocol("bos-512"), 0),
               UsageError);  // less than a window
  EXPECT_THROW(WindowsOfText(source, "text", tokenizer_, {.bos = std::nullopt, .eos = 2},
                             {.name = "bos", .window = 8}, 0),
               UsageError);
}

}  // namespace
}  // namespace winnow
