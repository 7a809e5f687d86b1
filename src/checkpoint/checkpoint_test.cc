#include "checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>

#include "checkpoint/safetensors_writer.h"
#include "checkpoint/shard_index.h"
#include "checkpoint/test_folder.h"

namespace winnow {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

const fs::path kData = fs::path(WINNOW_TEST_DATA) / "checkpoint" / "folders";

// Shards with one-byte tensors.
void WriteShard(const fs::path& path, const std::vector<std::string>& names, std::byte value = {}) {
  const std::array<std::byte, 1> data = {value};
  std::vector<TensorData> tensors;
  for (const std::string& name : names) tensors.push_back({name, Dtype::kU8, {1}, data});
  WriteSafetensors(path, tensors, {{"format", "pt"}});
}

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() { folder_.Write("config.json", R"({"z":1,"a":{"y":2.50,"b":[]}})"); }
  void Shard(const std::string& name, const std::vector<std::string>& tensors) {
    WriteShard(folder_.path() / name, tensors);
  }
  void Index(const std::string& weight_map, const std::string& metadata = R"({"total_size":2})") {
    folder_.Write("model.safetensors.index.json",
                  R"({"metadata":)" + metadata + R"(,"weight_map":)" + weight_map + "}");
  }
  // Two complete shards with an index.
  void TwoShards() {
    Shard("model-00001-of-00002.safetensors", {"a"});
    Shard("model-00002-of-00002.safetensors", {"b"});
    Index(kTwo);
  }
  Checkpoint Open() { return Checkpoint::Open(folder_.path()); }
  std::string OpenError() {
    return ModelErrorOf([&] { Open(); });
  }
  static constexpr char kTwo[] =
      R"({"b":"model-00002-of-00002.safetensors","a":"model-00001-of-00002.safetensors"})";
  TestFolder folder_;
};

TEST_F(CheckpointTest, ShardsIndexAndConfig) {
  TwoShards();
  const Checkpoint checkpoint = Open();
  EXPECT_TRUE(checkpoint.has_index());
  EXPECT_THAT(checkpoint.findings(), IsEmpty());
  EXPECT_EQ(checkpoint.shards().size(), 2u);
  EXPECT_EQ(checkpoint.total_bytes(), 2u);
  ASSERT_EQ(checkpoint.tensors().size(), 2u);
  EXPECT_EQ(checkpoint.tensors()[1].name, "b");
  EXPECT_EQ(checkpoint.tensors()[1].shard, 1);
  EXPECT_EQ(checkpoint.Find("b"), &checkpoint.tensors()[1]);
  EXPECT_EQ(checkpoint.Find("c"), nullptr);
  std::array<std::byte, 1> value{std::byte{9}};
  checkpoint.Read(*checkpoint.Find("b"), value);
  EXPECT_EQ(value[0], std::byte{0});
  EXPECT_EQ(checkpoint.config().begin().key(), "z");  // the file's order
}

TEST_F(CheckpointTest, PublishedFolders) {
  const Checkpoint checkpoint = Checkpoint::Open(kData / "index/ok");
  EXPECT_EQ(checkpoint.tensors().size(), 16u);
  EXPECT_EQ(checkpoint.total_bytes(), 5280u);
  EXPECT_THAT(checkpoint.findings(),
              ElementsAre("the index gives a total_size of 5000 bytes, the tensors have 5280"));
  const auto error = [](const char* folder) {
    return ModelErrorOf([&] { Checkpoint::Open(kData / folder); });
  };
  EXPECT_THAT(error("index/missing-shard"), HasSubstr("missing model-00002-of-00002.safetensors"));
  EXPECT_THAT(error("index/path-traversal"),
              AllOf(HasSubstr("model.norm.weight"), HasSubstr("../x.safetensors")));
  EXPECT_THAT(
      error("index/tensor-not-in-shard"),
      AllOf(HasSubstr("lm_head.weight"), HasSubstr("model-00001-of-00002.safetensors does")));
  EXPECT_THAT(error("model/truncated"), HasSubstr("the file has 5180"));
  EXPECT_THAT(error("model/name-path-traversal"), HasSubstr("../../outside.weight"));
}

TEST_F(CheckpointTest, HubCacheSnapshotOfLinks) {
  const TestFolder cache;
  cache.Write("blobs/1111", R"({"model_type":"mixtral"})");
  WriteShard(cache.path() / "blobs/2222", {"a"});
  cache.Write("blobs/3333", "tokens");
  const fs::path snapshot = cache.path() / "snapshots/abc";
  fs::create_directories(snapshot);
  fs::create_symlink("../../blobs/1111", snapshot / "config.json");
  fs::create_symlink("../../blobs/2222", snapshot / "model.safetensors");
  fs::create_symlink("../../blobs/3333", snapshot / "tokenizer.json");
  const Checkpoint checkpoint = Checkpoint::Open(snapshot);
  EXPECT_NE(checkpoint.Find("a"), nullptr);
  EXPECT_THAT(checkpoint.OtherFiles(), ElementsAre(fs::path("tokenizer.json")));
  try {
    Checkpoint::Open(cache.path());
    FAIL();
  } catch (const ModelError& e) {
    EXPECT_THAT(e.hint(), HasSubstr("snapshots/<revision>"));
  }
  fs::remove(cache.path() / "blobs/2222");
  EXPECT_THAT(ModelErrorOf([&] { Checkpoint::Open(snapshot); }), HasSubstr("model.safetensors"));
}

TEST_F(CheckpointTest, FoldersWithoutAnIndex) {
  Shard("weights.safetensors", {"a"});
  EXPECT_THAT(Open().findings(),
              ElementsAre(HasSubstr("weights.safetensors taken as the weights")));
  Shard("model-00001-of-00002.safetensors", {"a"});
  EXPECT_THAT(OpenError(), AllOf(HasSubstr("missing model-00002-of-00002.safetensors"),
                                 HasSubstr("1 of 2 shards")));
  Shard("model-00002-of-00002.safetensors", {"b"});
  const Checkpoint numbered = Open();
  EXPECT_EQ(numbered.tensors().size(), 2u);
  EXPECT_THAT(numbered.findings(),
              ElementsAre(HasSubstr("2 numbered shards"),
                          HasSubstr("not read as weights: weights.safetensors")));
  Shard("model.safetensors", {"c"});
  EXPECT_EQ(Open().tensors().size(), 1u);
  EXPECT_THAT(Open().findings(), ElementsAre(HasSubstr("not read as weights: model-00001")));
}

TEST_F(CheckpointTest, SeveralSetsOfNumberedShards) {
  Shard("model-00001-of-00001.safetensors", {"a"});
  Shard("original-00001-of-00002.safetensors", {"b"});
  EXPECT_NE(Open().Find("a"), nullptr);
  fs::rename(folder_.path() / "model-00001-of-00001.safetensors",
             folder_.path() / "other-00001-of-00001.safetensors");
  EXPECT_THAT(OpenError(), HasSubstr("2 different sets"));
}

TEST_F(CheckpointTest, IndexAndSingleFile) {
  TwoShards();
  Shard("model.safetensors", {"c"});
  EXPECT_TRUE(Open().has_index());
  EXPECT_THAT(Open().findings(), ElementsAre(HasSubstr("not read as weights: model.safetensors")));
  fs::remove(folder_.path() / "model-00002-of-00002.safetensors");
  const Checkpoint single = Open();
  EXPECT_FALSE(single.has_index());
  EXPECT_NE(single.Find("c"), nullptr);
  EXPECT_THAT(single.findings(), ElementsAre(HasSubstr("model.safetensors is read instead"),
                                             HasSubstr("not read as weights: model-00001")));
  fs::remove(folder_.path() / "model.safetensors");
  EXPECT_THAT(OpenError(), HasSubstr("missing model-00002-of-00002.safetensors"));
}

TEST_F(CheckpointTest, TensorsOutsideTheIndex) {
  TwoShards();
  Shard("model-00002-of-00002.safetensors", {"b", "rope"});
  Shard("extra.safetensors", {"a"});
  const Checkpoint checkpoint = Open();
  EXPECT_NE(checkpoint.Find("rope"), nullptr);
  EXPECT_EQ(checkpoint.tensors().size(), 3u);
  EXPECT_THAT(checkpoint.findings(),
              ElementsAre(HasSubstr("not read as weights: extra.safetensors"),
                          HasSubstr("1 tensor of the shards is not in the index (\"rope\")"),
                          HasSubstr("total_size of 2 bytes, the tensors have 3")));
  Shard("model-00002-of-00002.safetensors", {"b", "a"});
  EXPECT_THAT(OpenError(), HasSubstr("tensor \"a\" is in two shards"));
}

TEST_F(CheckpointTest, OnlyOtherFormats) {
  folder_.Write("pytorch_model.bin", "x");
  EXPECT_THAT(OpenError(), AllOf(HasSubstr("pytorch_model.bin"), HasSubstr("only safetensors")));
  fs::remove(folder_.path() / "pytorch_model.bin");
  EXPECT_THAT(OpenError(), HasSubstr("no weights"));
}

TEST_F(CheckpointTest, Config) {
  Shard("model.safetensors", {"a"});
  folder_.Write("config.json", "[]");
  EXPECT_THAT(OpenError(), AllOf(HasSubstr("config.json"), HasSubstr("expected an object")));
  folder_.Write("config.json", R"({"a":1,"a":2})");
  EXPECT_THAT(OpenError(), HasSubstr("twice"));
  std::string many = "{\"k\":{";
  for (int i = 0; i < 10'001; ++i) many += "\"" + std::to_string(i) + "\":0,";
  many.back() = '}';
  folder_.Write("config.json", many + "}");
  EXPECT_THAT(OpenError(), HasSubstr("10001 keys"));
  fs::remove(folder_.path() / "config.json");
  EXPECT_THAT(OpenError(), HasSubstr("no config.json"));
  EXPECT_THAT(ModelErrorOf([&] { Checkpoint::Open(folder_.path() / "model.safetensors"); }),
              HasSubstr("not a folder"));
  EXPECT_THAT(ModelErrorOf([&] { Checkpoint::Open(folder_.path() / "none"); }),
              HasSubstr("no such folder"));
}

TEST_F(CheckpointTest, OtherFilesAreWhatARewriteCarriesThrough) {
  TwoShards();
  for (const char* name : {"tokenizer.json", "generation_config.json", "modeling_x.py",
                           ".gitattributes", "reference.safetensors", "pytorch_model.bin",
                           "consolidated.00.pth", "model.Q4.gguf", "x.safetensors.partial", "y.tmp",
                           "sub/file.json", ".git/config", "sub/out.partial/file.json"}) {
    folder_.Write(name, "x");
  }
  std::vector<std::string> names;
  for (const fs::path& path : Open().OtherFiles()) names.push_back(path);
  EXPECT_THAT(names, ElementsAre(".gitattributes", "generation_config.json", "modeling_x.py",
                                 "sub/file.json", "tokenizer.json"));
}

TEST_F(CheckpointTest, FingerprintFollowsConfigHeadersAndData) {
  TwoShards();
  const std::string original = Open().FingerprintHex();
  EXPECT_EQ(original.size(), 32u);
  EXPECT_EQ(Open().FingerprintHex(), original);
  WriteShard(folder_.path() / "model-00002-of-00002.safetensors", {"b"}, std::byte{1});
  const std::string other_data = Open().FingerprintHex();
  EXPECT_NE(other_data, original);
  folder_.Write("config.json", R"({"z":2,"a":{"y":2.50,"b":[]}})");
  EXPECT_NE(Open().FingerprintHex(), other_data);
  const std::string before = Open().FingerprintHex();
  folder_.Write("tokenizer.json", "{}");
  EXPECT_EQ(Open().FingerprintHex(), before);
}

TEST(ShardIndexTest, RefusesAnythingButPlainFileNames) {
  const auto error = [](const std::string& text) {
    return ModelErrorOf([&] { ParseShardIndex(text, "i"); });
  };
  const auto map = [&](const std::string& value) {
    return error(R"({"weight_map":{"a":)" + value + "}}");
  };
  EXPECT_THAT(error("[]"), HasSubstr("is an array, expected an object"));
  EXPECT_THAT(error("{}"), HasSubstr("no weight_map"));
  EXPECT_THAT(error(R"({"weight_map":{}})"), HasSubstr("weight_map is empty"));
  EXPECT_THAT(error(R"({"weight_map":"a"})"), HasSubstr("weight_map is a string"));
  EXPECT_THAT(error(R"({"weight_map":["a"]})"), HasSubstr("weight_map is an array"));
  EXPECT_THAT(error(R"({"weight_map":{"a":"b.safetensors"},"weight_map":{}})"), HasSubstr("twice"));
  EXPECT_THAT(error(R"({"weight_map":{"a":"b.safetensors","a":"b.safetensors"}})"),
              HasSubstr("tensor \"a\" appears twice"));
  EXPECT_THAT(error(R"({"weight_map":{"a":"b.safetensors"}} x)"), HasSubstr("not valid JSON"));
  EXPECT_THAT(error(std::string("{}\0", 3)), HasSubstr("zero byte"));
  EXPECT_THAT(error(R"({"x":)" + std::string(100, '[')), HasSubstr("deeper than 64"));
  EXPECT_THAT(map("1"), HasSubstr("is mapped to a number"));
  EXPECT_THAT(map("null"), HasSubstr("is mapped to null"));
  EXPECT_THAT(map("{}"), HasSubstr("is mapped to an object"));
  EXPECT_THAT(map(R"("")"), HasSubstr("is empty"));
  EXPECT_THAT(map(R"("..")"), HasSubstr(".."));
  EXPECT_THAT(map(R"("/a.safetensors")"), HasSubstr("starts with /"));
  EXPECT_THAT(map(R"("sub/a.safetensors")"), HasSubstr("path separator"));
  EXPECT_THAT(map(R"("a\\b.safetensors")"), HasSubstr("backslash"));
  EXPECT_THAT(map(R"("a.bin")"), HasSubstr("no .safetensors file"));
  EXPECT_THAT(map(R"(".a.safetensors")"), HasSubstr("hidden"));
}

TEST(ShardIndexTest, SkipsWhatItDoesNotKnow) {
  const ShardIndex index = ParseShardIndex(
      R"({"weight_map":{"c":"2.safetensors","a":"2.safetensors","b":"1.safetensors"},"x":[{"y":[1]}],)"
      R"("metadata":{"total_parameters":7,"total_size":12.0,"n":{"total_size":1}}})",
      "i");
  EXPECT_THAT(index.files, ElementsAre("1.safetensors", "2.safetensors"));
  EXPECT_THAT(index.weight_map,
              ElementsAre(std::pair("a", 1u), std::pair("b", 0u), std::pair("c", 1u)));
  EXPECT_EQ(index.total_size, 12.0);
}

}  // namespace
}  // namespace winnow
