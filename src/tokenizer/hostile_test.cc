// Files that are damaged, malicious or beyond what is supported: refused with a ModelError that
// names the place, never a crash, a hang or memory sized by a number in the file.
#include <gtest/gtest.h>

#include <string>

#include "base/error.h"
#include "base/json.h"
#include "tokenizer/tokenizer.h"

namespace winnow {
namespace {

Json Valid() {
  return {{"version", "1.0"},
          {"added_tokens",
           {{{"id", 6},
             {"content", "<s>"},
             {"single_word", false},
             {"lstrip", false},
             {"rstrip", false},
             {"normalized", false},
             {"special", true}}}},
          {"normalizer", nullptr},
          {"pre_tokenizer", nullptr},
          {"post_processor", nullptr},
          {"decoder", nullptr},
          {"model",
           {{"type", "BPE"},
            {"vocab", {{"a", 0}, {"b", 1}, {" ", 2}, {"ab", 3}, {"abb", 4}, {"  ", 5}}},
            {"merges", Json::array({Json::array({"a", "b"}), Json::array({"ab", "b"}),
                                    Json::array({" ", " "})})}}}};
}

Tokenizer Parse(const Json& json) {
  return Tokenizer::FromJson(json.dump(), "", "t.json");
}

// The message a file is refused with; empty if it is accepted.
std::string Refusal(const std::string& json) {
  try {
    Tokenizer::FromJson(json, "", "t.json");
  } catch (const ModelError& error) {
    EXPECT_TRUE(std::string(error.what()).starts_with("t.json: ")) << error.what();
    return error.what();
  }
  return {};
}
std::string Refusal(const Json& json) {
  return Refusal(json.dump());
}

#define EXPECT_REFUSED(json, words) \
  EXPECT_NE(Refusal(json).find(words), std::string::npos) << "got: " << Refusal(json)

TEST(Hostile, TheControlIsAccepted) {
  EXPECT_EQ(Parse(Valid()).Encode("abb<s>ba", false), (std::vector<int32_t>{4, 6, 1, 0}));
}

TEST(Hostile, BrokenJson) {
  const std::string text = Valid().dump();
  for (size_t cut = 0; cut < text.size(); ++cut) EXPECT_NE(Refusal(text.substr(0, cut)), "") << cut;
  EXPECT_REFUSED(std::string("[]"), "expected an object");
  EXPECT_REFUSED(std::string("{\"model\": {\"vocab\": {}, \"vocab\": {}}}"), "twice");
  EXPECT_REFUSED(std::string("{\"model\": {\"vocab\": {\"a\xff\": 1}}}"), "JSON");
  EXPECT_REFUSED(std::string("{\"model\": {\"vocab\": {\"a\": 0, \"a\": 1}, \"merges\": []}}"),
                 "twice");
  std::string nested;
  for (int i = 0; i < 1500; ++i) nested += "{\"type\":\"Sequence\",\"normalizers\":[";
  EXPECT_REFUSED("{\"normalizer\":" + nested, "nested deeper");
}

TEST(Hostile, BrokenModel) {
  Json json = Valid();
  json["model"].erase("merges");
  EXPECT_REFUSED(json, "merges are missing");
  json = Valid();
  json["model"]["vocab"] = nullptr;
  EXPECT_REFUSED(json, "vocab is missing");
  json["model"]["vocab"] = Json::array({Json::array({"a", -1.5})});  // Unigram's form
  EXPECT_REFUSED(json, "wrong type");
  json.erase("model");
  EXPECT_REFUSED(json, "no model");

  const auto with_id = [](const Json& id) {
    Json changed = Valid();
    changed["model"]["vocab"]["zz"] = id;
    return changed;
  };
  for (const Json& id : {Json(uint64_t{1} << 40), Json(2147483647), Json(-1), Json(1.0), Json("1"),
                         Json(nullptr), Json::array(), Json::object()}) {
    EXPECT_REFUSED(with_id(id), "zz");
  }
  EXPECT_REFUSED(with_id(3), "same id");
  // A large id is no reason to refuse, and no table is sized by it.
  json = with_id(2147483646);
  json["added_tokens"] = Json::array();  // whose ids follow from the vocabulary's size
  EXPECT_EQ(Parse(json).vocab_size(), 2147483647);

  const auto with_merge = [](const Json& merge) {
    Json changed = Valid();
    changed["model"]["merges"].push_back(merge);
    return changed;
  };
  EXPECT_REFUSED(with_merge(Json::array({"a", "q"})), "\"q\" is not in the vocabulary");
  EXPECT_REFUSED(with_merge(Json::array({"b", "b"})), "\"bb\" is not in the vocabulary");
  EXPECT_REFUSED(with_merge(Json::array({"a", "b", "b"})), "two parts");
  EXPECT_REFUSED(with_merge(Json::array({"a"})), "two parts");
  EXPECT_REFUSED(with_merge("a b"), "all strings or all pairs");
  EXPECT_REFUSED(with_merge(7), "two strings");
  EXPECT_REFUSED(with_merge(Json::array({"a", Json::array({"b"})})), "two strings");
  json = Valid();
  json["model"]["merges"] = Json::array({"#version: 0.2", "a b"});
  EXPECT_EQ(Refusal(json), "");
  json["model"]["merges"] = Json::array({"a b c"});
  EXPECT_REFUSED(json, "one space");

  for (const auto& [field, value] :
       std::initializer_list<std::pair<const char*, Json>>{{"type", "WordPiece"},
                                                           {"dropout", 0.1},
                                                           {"unk_token", 1},
                                                           {"fuse_unk", "yes"},
                                                           {"byte_fallback", 1},
                                                           {"ignore_merges", "x"},
                                                           {"end_of_word_suffix", 0},
                                                           {"something_new", true}}) {
    json = Valid();
    json["model"][field] = value;
    EXPECT_REFUSED(json, "model");
  }
}

TEST(Hostile, UnknownComponentsAreNamed) {
  for (const auto& [part, type] : std::initializer_list<std::pair<const char*, const char*>>{
           {"normalizer", "Precompiled"},
           {"normalizer", "BertNormalizer"},
           {"normalizer", "Nmt"},
           {"pre_tokenizer", "UnicodeScripts"},
           {"pre_tokenizer", "FixedLength"},
           {"post_processor", "Mystery"},
           {"decoder", "WordPiece"},
           {"decoder", "CTC"}}) {
    Json json = Valid();
    json[part] = {{"type", type}};
    EXPECT_REFUSED(json, type);
    json[part] = {{"type", 5}};
    EXPECT_REFUSED(json, "type");
    json[part] = "NFC";
    EXPECT_REFUSED(json, part);
  }
  Json json = Valid();
  json["version"] = "2.0";
  EXPECT_REFUSED(json, "version");
  json = Valid();
  json["more"] = 1;
  EXPECT_REFUSED(json, "more");
}

TEST(Hostile, BrokenAddedTokens) {
  const auto with = [](const char* field, const Json& value) {
    Json json = Valid();
    json["added_tokens"][0][field] = value;
    return json;
  };
  EXPECT_REFUSED(with("id", uint64_t{1} << 40), "expected an integer");
  EXPECT_REFUSED(with("id", -1), "expected an integer");
  EXPECT_REFUSED(with("id", 9), "its place in the vocabulary is 6");
  EXPECT_REFUSED(with("content", "ab"), "its place in the vocabulary is 3");
  EXPECT_REFUSED(with("content", std::string(5000, 'x')), "5000 bytes");
  for (const char* field :
       {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}) {
    EXPECT_REFUSED(with(field, nullptr), field);
  }
  Json json = Valid();
  json["added_tokens"].push_back(json["added_tokens"][0]);
  EXPECT_REFUSED(json, "added before");
  json = with("normalized", true);
  json["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "<s>"}}}, {"content", ""}};
  EXPECT_REFUSED(json, "leaves nothing");
  json["added_tokens"] = 3;
  EXPECT_REFUSED(json, "expected an array");
}

TEST(Hostile, BrokenPostProcessor) {
  const auto with = [](const Json& single) {
    Json json = Valid();
    json["post_processor"] = {
        {"type", "TemplateProcessing"},
        {"single", single},
        {"pair", Json::array()},
        {"special_tokens", {{"<s>", {{"ids", {6}}}}, {"<t>", {{"ids", {7}}}}}}};
    return json;
  };
  const Json text = {{"Sequence", {{"id", "A"}}}};
  const Json bos = {{"SpecialToken", {{"id", "<s>"}}}};
  EXPECT_EQ(Parse(with(Json::array({bos, text}))).Encode("a", true), (std::vector<int32_t>{6, 0}));
  EXPECT_REFUSED(with(Json::array({bos})), "drops the text");
  EXPECT_REFUSED(with(Json::array({text, text})), "twice");
  EXPECT_REFUSED(with(Json::array({Json{{"Sequence", {{"id", "B"}}}}})), "must be A");
  EXPECT_REFUSED(with(Json::array({text, Json{{"SpecialToken", {{"id", "<x>"}}}}})), "<x>");
  EXPECT_REFUSED(with(Json::array({text, Json{{"SpecialToken", {{"id", "<t>"}}}}})),
                 "no token with id 7");
  Json json = with(Json::array({bos, text}));
  json["post_processor"] = {
      {"type", "Sequence"},
      {"processors", Json::array({json["post_processor"], json["post_processor"]})}};
  EXPECT_REFUSED(json, "more than one");
}

// Rules that double the text at every step.
TEST(Hostile, GrowthIsBounded) {
  Json step = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  Json json = Valid();
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::vector<Json>(40, step)}};
  EXPECT_THROW(Parse(json).Encode("a", false), ModelError);
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::vector<Json>(100, step)}};
  EXPECT_REFUSED(json, "more than 64 steps");
  json["normalizer"] = nullptr;
  json["decoder"] = {{"type", "Sequence"}, {"decoders", std::vector<Json>(40, step)}};
  EXPECT_THROW(Parse(json).Decode(std::vector<int32_t>{0}, false), ModelError);
  json["decoder"] = nullptr;
  step = {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", false}};
  json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", std::vector<Json>(20, step)}};
  EXPECT_REFUSED(json, "too many stages");
  step = {{"type", "WhitespaceSplit"}};
  json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", std::vector<Json>(70, step)}};
  EXPECT_REFUSED(json, "too many stages");
}

TEST(Hostile, UnknownCharactersWithoutUnkToken) {
  Json json = Valid();
  EXPECT_EQ(Parse(json).Encode("aza", false), (std::vector<int32_t>{0, 0}));  // dropped
  json["model"]["unk_token"] = "<unk>";  // not in the vocabulary: the library fails here too
  EXPECT_EQ(Parse(json).Encode("ab", false), (std::vector<int32_t>{3}));
  EXPECT_THROW(Parse(json).Encode("aza", false), ModelError);
}

}  // namespace
}  // namespace winnow
