// The ids and texts of eight tokenizer styles, of many small random tokenizers and of hostile
// files. Expected values come from the `tokenizers` library 0.23.3 (tests/data/tokenizers).
#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace winnow {
namespace {

const fs::path kData = fs::path(WINNOW_TEST_DATA) / "tokenizers";
const char* const kStyles[] = {"deepseek-llm", "deepseek-v3", "gpt_oss",           "llama3",
                               "mixtral",      "olmoe",       "mixtral-metaspace", "qwen"};

std::vector<Json> ReadLines(const fs::path& path) {
  std::vector<Json> lines;
  const std::string text = ReadTextFile(path);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    lines.push_back(ParseJson(text.substr(begin, end - begin), path.string()));
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return lines;
}

using Ids = std::vector<int32_t>;

std::string StreamAll(const Tokenizer& tokenizer, const Ids& ids, bool skip) {
  StreamDecoder stream(tokenizer, skip);
  std::string text;
  for (const int32_t id : ids) text += stream.Put(id);
  return text + stream.Finish();
}

class StyleTest : public testing::TestWithParam<const char*> {
 protected:
  const fs::path folder_ = kData / GetParam();
  const Tokenizer tokenizer_ = Tokenizer::Load(folder_);
};

TEST_P(StyleTest, GivesTheReferenceIdsAndTexts) {
  for (const Json& line : ReadLines(folder_ / "golden.jsonl")) {
    const std::string text = line["text"];
    SCOPED_TRACE(line["text"].dump());
    EXPECT_EQ(tokenizer_.Encode(text, false), line["ids"].get<Ids>());
    EXPECT_EQ(tokenizer_.Encode(text, true), line["ids_special"].get<Ids>());
    EXPECT_EQ(tokenizer_.Decode(line["ids"].get<Ids>(), false), line["decoded"]);
    EXPECT_EQ(tokenizer_.Decode(line["ids_special"].get<Ids>(), true),
              line["decoded_skip_special"]);
  }
}

TEST_P(StyleTest, StreamsTheReferencePieces) {
  for (const Json& line : ReadLines(folder_ / "stream.jsonl")) {
    SCOPED_TRACE(line["ids"].dump());
    const Ids ids = line["ids"].get<Ids>();
    EXPECT_EQ(tokenizer_.Decode(ids, false), line["final"]);
    if (!line.contains("pieces")) {
      StreamAll(tokenizer_, ids, false);  // broken byte tokens: need not agree, must not crash
      continue;
    }
    StreamDecoder stream(tokenizer_, false);
    std::vector<std::string> pieces;
    for (const int32_t id : ids) pieces.push_back(stream.Put(id));
    EXPECT_EQ(pieces, line["pieces"].get<std::vector<std::string>>());
    EXPECT_EQ(stream.Finish(), line["rest"]);
  }
}

// Every id by itself and next to others, in an order that makes broken characters.
TEST_P(StyleTest, StreamAgreesWithDecodeForAnyIds) {
  const bool has_byte_tokens = tokenizer_.TokenToId("<0x00>").has_value();
  Ids ids;
  uint32_t state = 1;
  for (int round = 0; round < 200; ++round) {
    ids.clear();
    for (int i = 0; i < 40; ++i) {
      state = state * 1664525 + 1013904223;
      // Half of them from the first 260 ids, where single bytes are; some unused ids.
      const uint32_t range =
          state >> 31 != 0 ? 260 : static_cast<uint32_t>(tokenizer_.vocab_size()) + 20;
      ids.push_back(static_cast<int32_t>((state >> 8) % range));
      if (has_byte_tokens && ids.back() < 259 && ids.back() >= 131) ids.back() -= 128;  // ASCII
    }
    for (const bool skip : {false, true}) {
      EXPECT_EQ(StreamAll(tokenizer_, ids, skip), tokenizer_.Decode(ids, skip));
    }
  }
}

TEST_P(StyleTest, LongRunsOfOneThingEncode) {
  for (const char* unit : {" ", "a", "\n", "\r\n", "7", "!", " \t", "e\xCC\x81\xCC\xA7",
                           "\xE6\x97\xA5", "\xF0\x9F\x98\x80", "\xE2\x80\x8B", "</s>", "'s"}) {
    std::string text;
    while (text.size() < 200000) text += unit;
    text += "\xE0\xB8\x81";  // a Thai letter: no stage isolates it from spaces before it
    const Ids ids = tokenizer_.Encode(text, false);
    EXPECT_FALSE(ids.empty());
    EXPECT_LT(ids.size(), 2 * text.size());
  }
}

INSTANTIATE_TEST_SUITE_P(All, StyleTest, testing::ValuesIn(kStyles), [](const auto& style) {
  std::string name = style.param;
  std::erase_if(name, [](char c) { return c == '-' || c == '_'; });
  return name;
});

// Small random vocabularies with all components in all kinds of combinations.
TEST(Tokenizer, ComponentsInCombinationAgreeWithTheReference) {
  for (const Json& line : ReadLines(kData / "components.jsonl")) {
    const std::string json = line["tokenizer"].dump();
    SCOPED_TRACE(json.substr(0, 2000));
    const Tokenizer tokenizer = Tokenizer::FromJson(json, "", "components.jsonl");
    for (const Json& test : line["cases"]) {
      SCOPED_TRACE(test["text"].dump());
      EXPECT_EQ(tokenizer.Encode(test["text"].get<std::string>(), false), test["ids"].get<Ids>());
      EXPECT_EQ(tokenizer.Encode(test["text"].get<std::string>(), true),
                test["special"].get<Ids>());
      if (test.contains("dec")) {
        EXPECT_EQ(tokenizer.Decode(test["ids"].get<Ids>(), false), test["dec"]);
        EXPECT_EQ(tokenizer.Decode(test["special"].get<Ids>(), true), test["decskip"]);
      }
      if (test.contains("rand")) {
        EXPECT_EQ(tokenizer.Decode(test["rand"].get<Ids>(), true), test["randdec"]);
      }
    }
  }
}

TEST(Tokenizer, SpecialIdsFollowTokenizerConfig) {
  const std::string json = ReadTextFile(kData / "deepseek-v3" / "tokenizer.json");
  const Tokenizer bare = Tokenizer::FromJson(json, "", "bare");
  EXPECT_FALSE(bare.bos_id().has_value());
  EXPECT_FALSE(bare.adds_bos());
  EXPECT_EQ(bare.Encode("", true), Ids());

  const auto load = [&](Json config) {
    config["bos_token"] = "<｜begin▁of▁sentence｜>";
    if (!config.contains("eos_token")) {
      config["eos_token"] = {{"content", "<｜end▁of▁sentence｜>"}, {"special", true}};
    }
    return Tokenizer::FromJson(json, config.dump(), "config");
  };
  const Tokenizer llama = load({{"tokenizer_class", "LlamaTokenizer"}});  // adds BOS by default
  EXPECT_EQ(llama.bos_id(), 4200);
  EXPECT_EQ(llama.eos_id(), 4201);
  EXPECT_TRUE(llama.adds_bos());
  EXPECT_EQ(llama.Encode("", true), Ids({4200}));
  EXPECT_EQ(load({{"tokenizer_class", "LlamaTokenizerFast"},
                  {"add_bos_token", false},
                  {"add_eos_token", true}})
                .Encode("", true),
            Ids({4201}));
  const Tokenizer other =
      load({{"tokenizer_class", "PreTrainedTokenizerFast"}, {"add_bos_token", true}});
  EXPECT_EQ(other.Encode("", true), Ids());  // this class leaves it to tokenizer.json
  EXPECT_EQ(other.bos_id(), 4200);
  EXPECT_FALSE(other.adds_bos());
  EXPECT_FALSE(load({{"eos_token", nullptr}}).eos_id().has_value());
  EXPECT_THROW(
      load(
          {{"tokenizer_class", "LlamaTokenizer"}, {"add_eos_token", true}, {"eos_token", nullptr}}),
      ModelError);
  EXPECT_THROW(load({{"tokenizer_class", 3}}), ModelError);
  EXPECT_THROW(Tokenizer::FromJson(json, "[]", "config"), ModelError);
}

TEST(Tokenizer, NamesTokensAndIds) {
  const Tokenizer tokenizer = Tokenizer::Load(kData / "olmoe" / "tokenizer.json");
  EXPECT_EQ(tokenizer.TokenToId("<|endoftext|>"), 4000);
  EXPECT_EQ(tokenizer.IdToToken(4000), "<|endoftext|>");
  EXPECT_EQ(tokenizer.IdToToken(0), "!");
  EXPECT_EQ(tokenizer.IdToToken(-1), "");
  EXPECT_EQ(tokenizer.IdToToken(4029), "");
  EXPECT_EQ(tokenizer.vocab_size(), 4029);
  EXPECT_FALSE(tokenizer.TokenToId("no such token").has_value());
  EXPECT_EQ(tokenizer.Decode(Ids({-1, 4029, 1 << 30}), false), "");
  EXPECT_EQ(tokenizer.eos_id(), 4000);
  EXPECT_FALSE(tokenizer.bos_id().has_value());
}

TEST(Tokenizer, InvalidUtf8IsReadAsReplacementCharacters) {
  const Tokenizer tokenizer = Tokenizer::Load(kData / "qwen");
  // Maximal ill-formed parts, as in the Unicode standard's table 3-8 and Rust's from_utf8_lossy.
  EXPECT_EQ(tokenizer.Encode("a\xF1\x80\x80\xE1\x80\xC2"
                             "b\x80"
                             "c\xED\xA0\x80\xFF",
                             false),
            tokenizer.Encode("a\uFFFD\uFFFD\uFFFD"
                             "b\uFFFD"
                             "c\uFFFD\uFFFD\uFFFD\uFFFD",
                             false));
}

TEST(Tokenizer, MissingFilesAreRuntimeErrors) {
  EXPECT_THROW(Tokenizer::Load(kData / "no-such-folder"), RuntimeError);
  EXPECT_THROW(Tokenizer::Load(kData), RuntimeError);
}

}  // namespace
}  // namespace winnow
