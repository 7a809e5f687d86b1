// stats.json: round trip, batches, and refusal of everything that does not fit.
#include "observe/stats_info.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "observe/test_support.h"

namespace winnow {
namespace {

StatsInfo Example() {
  StatsInfo info;
  info.model_fingerprint = "00ff";
  info.model_type = "qwen2_moe";
  info.model_bytes = uint64_t{5} << 40;
  info.num_layers = 4;
  info.hidden_size = 64;
  info.num_experts_per_tok = 2;
  info.normalize_epsilon = 1e-20;
  info.level = StatsLevel::kRouted;
  info.compute = "f32";
  info.isa = "avx2";
  info.batch = 2;
  info.sources = {{"prose", "aa", 3, 25, {{10, 2}, {5, 1}}}, {"code", "bb", 1, 7, {{7, 1}}}};
  info.layers = {{1, 8, 1000}, {3, 6, 2000}};
  return info;
}

Json ExampleJson() {
  return ParseJson(StatsInfoToJson(Example()).dump(), "test");
}

std::string Refusal(const Json& json) {
  return ModelErrorOf([&] { StatsInfoFromJson(json, "stats.json"); });
}

TEST(StatsInfo, RoundTripsThroughJson) {
  StatsInfo info = Example();
  for (const auto keep : {std::optional<int64_t>{}, std::optional<int64_t>{3}}) {
    info.progressive_keep = keep;
    const std::string text = StatsInfoToJson(info).dump();
    const StatsInfo again = StatsInfoFromJson(ParseJson(text, "test"), "test");
    EXPECT_EQ(StatsInfoToJson(again).dump(), text);
    EXPECT_EQ(again.progressive_keep, keep);
    EXPECT_EQ(again.sources[0].lengths, info.sources[0].lengths);
    EXPECT_EQ(again.model_bytes, info.model_bytes);
  }
  EXPECT_EQ(info.num_tokens(), 32);
}

TEST(StatsInfo, BatchesNeverStraddleSources) {
  EXPECT_EQ(Example().BatchTokens(), (std::vector<int64_t>{20, 5, 7}));
  StatsInfo info = Example();
  info.batch = 3;
  EXPECT_EQ(info.BatchTokens(), (std::vector<int64_t>{25, 7}));
  info.batch = 1;
  EXPECT_EQ(info.BatchTokens(), (std::vector<int64_t>{10, 10, 5, 7}));
}

TEST(StatsInfo, EveryFieldIsNeeded) {
  const Json good = ExampleJson();
  ASSERT_NO_THROW(StatsInfoFromJson(good, "test"));
  const auto expect_needed = [&](const std::string& pointer) {
    const Json::json_pointer parent(pointer);
    for (const auto& [key, value] : good.at(parent).items()) {
      Json cut = good;
      cut.at(parent).erase(key);
      EXPECT_NE(Refusal(cut).find("\"" + key + "\""), std::string::npos) << pointer << " " << key;
      Json odd = good;
      odd.at(parent)[key] = Json::array({Json::object()});
      EXPECT_FALSE(Refusal(odd).empty()) << pointer << " " << key;
    }
  };
  expect_needed("");
  expect_needed("/model");
  expect_needed("/sources/0");
  expect_needed("/layers/1");
}

TEST(StatsInfo, RefusesImplausibleValues) {
  const auto expect_refused = [](const std::string& pointer, const Json& value) {
    Json json = ExampleJson();
    json.at(Json::json_pointer(pointer)) = value;
    EXPECT_FALSE(Refusal(json).empty()) << pointer << " " << value;
  };
  expect_refused("/schema", "winnow.stats/1");
  expect_refused("/level", "everything");
  expect_refused("/batch", 0);
  expect_refused("/batch", 2.5);
  expect_refused("/progressive_keep", 0);
  expect_refused("/progressive_keep", "4");
  expect_refused("/model/num_layers", 0);
  expect_refused("/model/num_layers", 1 << 20);
  expect_refused("/model/hidden_size", -64);
  expect_refused("/model/num_experts_per_tok", 0);
  expect_refused("/model/norm_topk_prob", 1);
  expect_refused("/model/bytes", -1);
  expect_refused("/model/bytes", 18446744073709551615u);
  expect_refused("/layers/0/layer", 4);        // there are 4
  expect_refused("/layers/0/layer", 3);        // twice
  expect_refused("/layers/1/layer", 0);        // not ascending
  expect_refused("/layers/0/num_experts", 1);  // fewer than each token uses
  expect_refused("/layers/0/num_experts", 1 << 30);
  expect_refused("/layers/0/expert_bytes", 1.5);
  expect_refused("/sources/0/tokens", 26);  // the lengths say 25
  expect_refused("/sources/0/sequences", 4);
  const auto expect_lengths_refused = [&](const char* lengths) {
    expect_refused("/sources/0/lengths", Json::parse(lengths));
  };
  expect_lengths_refused("[[10,2,1],[5,1]]");
  expect_lengths_refused("[10,2]");
  expect_lengths_refused("[[10.0,2],[5,1]]");
  expect_lengths_refused("[[25,1],[10,-1],[10,3]]");
  expect_lengths_refused("[[4611686018427387904,4],[25,1]]");
  expect_lengths_refused("[[-5,1],[15,2]]");
  expect_lengths_refused("[[25,1],[0,2]]");
  // A short file must not stand for more sequences than memory holds.
  Json many = ExampleJson();
  many["sources"][0]["sequences"] = int64_t{1} << 39;
  many["sources"][0]["tokens"] = 0;
  many["sources"][0]["lengths"] = Json::parse("[[0,549755813888]]");
  EXPECT_FALSE(Refusal(many).empty());
  EXPECT_FALSE(Refusal(Json::array()).empty());
  EXPECT_FALSE(Refusal(Json("stats")).empty());
}

TEST(StatsInfo, LevelsHaveNames) {
  for (const StatsLevel level : {StatsLevel::kRouting, StatsLevel::kRouted, StatsLevel::kFull}) {
    EXPECT_EQ(ParseStatsLevel(std::string(StatsLevelName(level))), level);
  }
  EXPECT_THROW(ParseStatsLevel("Full"), UsageError);
}

TEST(StatsInfo, DescribesTheModel) {
  const Model model = Model::Open(GoldenFolder("qwen3_moe-dense-layer"));
  const StatsInfo info = DescribeModel(model);
  EXPECT_EQ(info.model_type, "qwen3_moe");
  EXPECT_EQ(info.num_layers, 3);
  ASSERT_EQ(info.layers.size(), 2u);  // layer 1 is dense
  EXPECT_EQ(info.layers[0].layer, 0);
  EXPECT_EQ(info.layers[1].layer, 2);
  EXPECT_EQ(info.layers[1].num_experts, 6);
  EXPECT_EQ(info.layers[1].expert_bytes, 3u * 16 * 64 * 4);
  EXPECT_EQ(info.model_fingerprint, model.checkpoint().FingerprintHex());
}

TEST(StatsFolder, IsRefusedWhenItIsNone) {
  const TestFolder folder;
  EXPECT_THROW(ReadStatsInfo(folder.path()), UsageError);
  folder.Write("stats.json", "{");
  EXPECT_THROW(ReadStatsInfo(folder.path()), ModelError);
}

// A layer's file must hold what stats.json promises.
TEST(StatsFolder, LayerFilesAreChecked) {
  const TestFolder folder;
  const fs::path stats = folder.path() / "stats";
  const Model model = Model::Open(GoldenFolder("mixtral"));
  Observe(model, {SourceOf("golden", GoldenTokens("mixtral"))}, {.level = StatsLevel::kRouted},
          stats);
  const StatsInfo info = ReadStatsInfo(stats);
  StatsLayer layer = info.layers[0];
  EXPECT_NO_THROW(LayerStatsReader(stats, info, layer));
  layer.num_experts = 5;
  EXPECT_THROW(LayerStatsReader(stats, info, layer), ModelError);
  StatsInfo full = info;
  full.level = StatsLevel::kFull;
  EXPECT_THROW(LayerStatsReader(stats, full, info.layers[0]), ModelError);
  StatsInfo longer = info;
  longer.sources[0].num_tokens += 1;
  EXPECT_THROW(LayerStatsReader(stats, longer, info.layers[0]), ModelError);
  fs::resize_file(LayerStatsPath(stats, 1), 1000);
  EXPECT_THROW(LayerStatsReader(stats, info, info.layers[1]), ModelError);
  fs::remove(LayerStatsPath(stats, 2));
  EXPECT_THROW(LayerStatsReader(stats, info, info.layers[2]), Error);
}

}  // namespace
}  // namespace winnow
