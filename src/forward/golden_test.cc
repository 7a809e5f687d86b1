// The forward pass against numbers of the reference implementations (tests/data/golden), and its
// own promise: the same bits whatever the number of threads, the tiling, the observer and the place
// of the stream.
#include <gtest/gtest.h>

#include "forward/attention.h"
#include "forward/feed_forward.h"
#include "forward/kv_cache.h"
#include "forward/test_support.h"

namespace winnow {
namespace {

// The reference's own f32 and f64 differ by up to a tenth of these; one broken rule moves the
// logits by 0.03 or more.
constexpr double kLogitsLimit = 2e-4;
constexpr double kHiddenLimit = 2e-4;
constexpr double kMoeOutLimit = 2e-4;
constexpr double kRouterLogitsLimit = 1e-4;
constexpr double kTopkWeightsLimit = 3e-5;

// Enough sequences of uneven length for two tiles.
TokenSet TwoTiles(int64_t vocab_size) {
  TokenSet tokens;
  uint64_t state = 1;
  std::vector<int32_t> sequence;
  while (tokens.num_tokens() < kTileTokens + 100) {
    sequence.clear();
    for (int64_t i = 0; i < 17 + tokens.num_sequences() % 60; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sequence.push_back(static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab_size)));
    }
    tokens.Append(sequence);
  }
  return tokens;
}

class GoldenForward : public testing::TestWithParam<const char*> {
 protected:
  GoldenForward()
      : model_(Model::Open(GoldenFolder(GetParam()))), tokens_(GoldenTokens(GetParam())) {}
  Model model_;
  TokenSet tokens_;
};

TEST_P(GoldenForward, AgreesWithTheReference) {
  const SafetensorsFile expected = GoldenValues(GetParam());
  const ForwardTrace got = RunForward(model_, tokens_);
  EXPECT_LE(MaxDifference(got.logits, ReadArray<float>(expected, "logits")), kLogitsLimit);
  EXPECT_LE(MaxDifference(got.hidden, ReadArray<float>(expected, "hidden")), kHiddenLimit);
  int64_t layers = 0;
  for (const TensorInfo& tensor : expected.tensors()) layers += tensor.name.ends_with(".topk_ids");
  ASSERT_EQ(static_cast<int64_t>(got.layers.size()), layers);
  for (const auto& [index, layer] : got.layers) {
    SCOPED_TRACE(index);
    const std::string prefix = "layers." + std::to_string(index) + ".";
    EXPECT_EQ(layer.topk_ids, ReadIntegers(expected, prefix + "topk_ids"));
    EXPECT_LE(
        MaxDifference(layer.router_logits, ReadArray<float>(expected, prefix + "router_logits")),
        kRouterLogitsLimit);
    EXPECT_LE(
        MaxDifference(layer.topk_weights, ReadArray<float>(expected, prefix + "topk_weights")),
        kTopkWeightsLimit);
    EXPECT_LE(MaxDifference(layer.moe_out, ReadArray<float>(expected, prefix + "moe_out")),
              kMoeOutLimit);
  }
}

// Token by token with a key-value cache: the reference's cached logits, and bit for bit our own of
// the whole sequence at once.
TEST_P(GoldenForward, CachedPassIsTheSamePass) {
  const SafetensorsFile expected = GoldenValues(GetParam());
  std::vector<int32_t> ids = ReadIntegers(expected, "gen.prompt");
  const size_t prompt = ids.size();
  const std::vector<int32_t> generated = ReadIntegers(expected, "gen.tokens");
  ids.insert(ids.end(), generated.begin(), generated.end() - 1);
  TokenSet whole;
  whole.Append(ids);
  const ForwardTrace at_once = RunForward(model_, whole);

  const ModelConfig& config = model_.config();
  const auto n = static_cast<int64_t>(ids.size());
  ThreadPool pool(2);
  AttentionBlock attention(config, pool);
  FeedForwardBlock feed_forward(config, pool);
  KeyValueCache cache(config.num_layers(), config.num_kv_heads, config.head_dim, n);
  LayerReader reader(model_, {.keep_resident = true});
  std::vector<float> hidden(static_cast<size_t>(n * config.hidden_size));
  LoadEmbeddings(model_, ids, hidden.data());
  for (int64_t t = 0; t < n;) {
    const int64_t count = t == 0 ? static_cast<int64_t>(prompt) : 1;
    float* rows = hidden.data() + t * config.hidden_size;
    for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
      const LayerWeights& weights = reader.Get(layer);
      attention.RunCached(weights, cache.length(), count, n, cache.layer(layer), rows);
      feed_forward.Run(weights, {.layer = layer}, count, rows);
    }
    cache.Advance(count);
    t += count;
  }
  EXPECT_EQ(hidden, at_once.hidden);
  std::vector<float> logits(static_cast<size_t>(n * config.vocab_size));
  ComputeLogits(model_, pool, hidden.data(), n, logits.data());
  EXPECT_EQ(logits, at_once.logits);
  logits.erase(logits.begin(),
               logits.begin() + static_cast<int64_t>(prompt - 1) * config.vocab_size);
  EXPECT_LE(MaxDifference(logits, ReadArray<float>(expected, "gen.logits")), kLogitsLimit);
}

TEST_P(GoldenForward, SameBitsForAnyNumberOfThreads) {
  const ForwardTrace one = RunForward(model_, tokens_);
  for (const int threads : {2, 3}) {
    const ForwardTrace other = RunForward(model_, tokens_, {.threads = threads});
    EXPECT_EQ(other.hidden, one.hidden) << threads;
    EXPECT_EQ(other.logits, one.logits) << threads;
    for (const auto& [index, layer] : one.layers) {
      EXPECT_EQ(other.layers.at(index).topk_weights, layer.topk_weights) << threads;
      EXPECT_EQ(other.layers.at(index).moe_out, layer.moe_out) << threads;
    }
  }
}

TEST_P(GoldenForward, SameBitsAloneAndAmongOthers) {
  const ForwardTrace together = RunForward(model_, tokens_);
  for (int64_t s = 0; s < tokens_.num_sequences(); ++s) {
    const auto begin = static_cast<size_t>(tokens_.offsets[static_cast<size_t>(s)]);
    const auto length = static_cast<size_t>(tokens_.length(s));
    TokenSet single;
    single.Append(std::span(tokens_.ids).subspan(begin, length));
    const ForwardTrace alone = RunForward(model_, single);
    const size_t row = static_cast<size_t>(model_.config().vocab_size);
    EXPECT_TRUE(std::equal(alone.logits.begin(), alone.logits.end(),
                           together.logits.begin() + static_cast<std::ptrdiff_t>(begin * row)))
        << s;
  }
}

TEST_P(GoldenForward, SameBitsWhoeverWatches) {
  const ForwardTrace unwatched = RunForward(model_, tokens_, {.watch = Watch::kNobody});
  for (const Watch watch : {Watch::kRouting, Watch::kSelectedOutputs, Watch::kExpertOutputs}) {
    EXPECT_EQ(RunForward(model_, tokens_, {.watch = watch}).logits, unwatched.logits);
  }
}

// The observer's expert outputs are the terms of the routed sum.
TEST_P(GoldenForward, ExpertOutputsAddUpToTheRoutedSum) {
  const ForwardTrace trace = RunForward(model_, tokens_, {.watch = Watch::kExpertOutputs});
  const int64_t n = tokens_.num_tokens(), h = model_.config().hidden_size;
  const int64_t k = model_.config().num_experts_per_tok;
  for (const auto& [index, layer] : trace.layers) {
    const int64_t experts = model_.config().layers[static_cast<size_t>(index)].num_experts;
    ASSERT_EQ(static_cast<int64_t>(layer.expert_outputs.size()), n * experts * h);
    std::vector<float> sum(static_cast<size_t>(n * h));
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < k; ++i) {
        const int64_t e = layer.topk_ids[static_cast<size_t>(t * k + i)];
        for (int64_t c = 0; c < h; ++c) {
          sum[static_cast<size_t>(t * h + c)] +=
              layer.topk_weights[static_cast<size_t>(t * k + i)] *
              layer.expert_outputs[static_cast<size_t>((t * experts + e) * h + c)];
        }
      }
    }
    EXPECT_LE(MaxDifference(sum, layer.routed), 1e-6);  // another order of at most 3 terms
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenForward,
                         testing::Values("mixtral", "mixtral-bf16-sharded", "mixtral-bf16-fused",
                                         "qwen2_moe", "qwen3_moe-bf16", "qwen3_moe-dense-layer",
                                         "olmoe", "deepseek-bf16"),
                         TestName);

TEST(Forward, LayoutsOfTheSameWeightsGiveTheSameBits) {
  const TokenSet tokens = GoldenTokens("mixtral-bf16-sharded");
  const Model sharded = Model::Open(GoldenFolder("mixtral-bf16-sharded"));
  const Model fused = Model::Open(GoldenFolder("mixtral-bf16-fused"));
  EXPECT_EQ(RunForward(sharded, tokens).logits, RunForward(fused, tokens).logits);
}

TEST(Forward, SameBitsFromDiskAndMemoryWithAndWithoutPrefetch) {
  const TestFolder folder;
  for (const char* name : {"mixtral", "deepseek-bf16"}) {
    const Model model = Model::Open(GoldenFolder(name));
    const TokenSet tokens = TwoTiles(model.config().vocab_size);
    ASSERT_EQ(SplitIntoTiles(tokens, kTileTokens).size(), 2u);
    const auto run = [&](bool prefetch, const fs::path& spill) {
      return RunForward(model, tokens,
                        {.threads = 2,
                         .prefetch = prefetch,
                         .watch = Watch::kNobody,
                         .spill = spill,
                         .logits = false})
          .hidden;
    };
    const std::vector<float> plain = run(false, {});
    EXPECT_EQ(run(true, {}), plain);
    EXPECT_EQ(run(false, folder.path() / "stream"), plain);
    EXPECT_EQ(run(true, folder.path() / "stream"), plain);
  }
}

// A window of one key: each token attends to itself alone, as if it were a sequence of its own.
// A window as long as the sequence changes nothing.
TEST(Forward, SlidingWindowLimitsTheKeys) {
  const TestFolder folder;
  const fs::path copy = CopyFolder(GoldenFolder("mixtral"), folder.path() / "model");
  const TokenSet tokens = GoldenTokens("mixtral");
  const auto run = [&](int64_t window, const TokenSet& set) {
    EditConfig(copy, [&](OrderedJson& config) { config["sliding_window"] = window; });
    return RunForward(Model::Open(copy), set).logits;
  };
  const std::vector<float> all = RunForward(Model::Open(GoldenFolder("mixtral")), tokens).logits;
  EXPECT_EQ(run(tokens.longest(), tokens), all);
  EXPECT_GT(MaxDifference(run(tokens.longest() - 1, tokens), all), 1e-3);
  TokenSet singles;
  for (const int32_t& id : tokens.ids) singles.Append(std::span(&id, 1));
  EXPECT_EQ(run(1, tokens), run(1, singles));
}

TEST(Forward, TilesHoldWholeSequences) {
  TokenSet tokens;
  const std::vector<int32_t> ids(50);
  for (const size_t length : {3u, 4u, 5u, 20u, 1u}) tokens.Append(std::span(ids).first(length));
  const std::vector<SequenceTile> tiles = SplitIntoTiles(tokens, 8);
  ASSERT_EQ(tiles.size(), 4u);
  EXPECT_EQ(tiles[0].lengths, (std::vector<int64_t>{3, 4}));
  EXPECT_EQ(tiles[1].lengths, (std::vector<int64_t>{5}));
  EXPECT_EQ(tiles[2].lengths, (std::vector<int64_t>{20}));
  EXPECT_EQ(tiles[3].lengths, (std::vector<int64_t>{1}));
  EXPECT_EQ(tiles[3].first_token, 32);
  EXPECT_EQ(tiles[3].first_sequence, 4);
}

TEST(Forward, RefusesIdsWithoutAnEmbedding) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  for (const int32_t id : {-1, 320}) {
    TokenSet tokens;
    tokens.Append(std::span(&id, 1));
    EXPECT_THROW(RunForward(model, tokens), UsageError) << id;
  }
}

}  // namespace
}  // namespace winnow
