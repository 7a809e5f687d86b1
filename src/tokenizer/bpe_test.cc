// The two merging loops, the cutting of long pieces and the cache against each other: they must not
// show in the ids.
#include "tokenizer/bpe.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tokenizer/tokenizer_file.h"

namespace winnow::tok {
namespace {

Bpe MakeBpe(const std::string& model) {
  TokenizerFile file = ParseTokenizerFile("{\"model\": " + model + "}", "test");
  return Bpe(file, "test");
}

std::vector<int32_t> Encode(const Bpe& bpe, const std::string& piece) {
  WordCache cache;
  BpeScratch scratch;
  std::vector<int32_t> ids;
  bpe.Encode(piece, cache, scratch, ids);
  return ids;
}

// Merges straight from the definition: the lowest rank, leftmost first, until none is left.
std::vector<std::string> MergeByDefinition(
    std::vector<std::string> symbols,
    const std::vector<std::pair<std::string, std::string>>& merges) {
  for (;;) {
    size_t best_rank = merges.size();
    size_t best_at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].first == symbols[i] && merges[rank].second == symbols[i + 1]) {
          best_rank = rank;
          best_at = i;
        }
      }
    }
    if (best_rank == merges.size()) return symbols;
    symbols[best_at] += symbols[best_at + 1];
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(best_at) + 1);
  }
}

TEST(Bpe, LongPiecesAgreeWithTheDefinition) {
  const std::vector<std::pair<std::string, std::string>> merges = {
      {"a", "b"}, {"b", "b"},   {"ab", "a"}, {"c", "ab"},
      {"a", "a"}, {"aa", "aa"}, {"bb", "c"}, {"ab", "bb"}};
  std::vector<std::string> tokens = {"a", "b", "c", "d", "<unk>"};
  std::string merge_json;
  for (const auto& [left, right] : merges) {
    tokens.push_back(left + right);
    merge_json += (merge_json.empty() ? "[\"" : ",[\"") + left + "\",\"" + right + "\"]";
  }
  std::string vocab_json;
  for (size_t i = 0; i < tokens.size(); ++i) {
    vocab_json += (i == 0 ? "\"" : ",\"") + tokens[i] + "\":" + std::to_string(i);
  }
  const Bpe bpe = MakeBpe("{\"vocab\":{" + vocab_json + "},\"merges\":[" + merge_json +
                          "],\"unk_token\":\"<unk>\",\"fuse_unk\":true}");
  uint32_t state = 7;
  WordCache cache;
  BpeScratch scratch;
  for (int round = 0; round < 400; ++round) {
    std::string text;
    std::vector<std::string> symbols;
    for (int i = 0; i < round; ++i) {
      state = state * 1664525 + 1013904223;
      text += "aabbccdz"[state >> 29];  // z is unknown; runs of it become one token
      if (text.back() != 'z') {
        symbols.emplace_back(1, text.back());
      } else if (symbols.empty() || symbols.back() != "<unk>") {
        symbols.emplace_back("<unk>");
      }
    }
    std::vector<std::string> got;
    std::vector<int32_t> ids;
    bpe.Encode(text, cache, scratch, ids);
    for (const int32_t id : ids) got.emplace_back(bpe.vocab().Token(id));
    EXPECT_EQ(got, MergeByDefinition(symbols, merges)) << text;
  }
}

TEST(Bpe, TheLastRankOfARepeatedPairWins) {
  // a+b has ranks 0 and 2, so b+c (rank 1) goes first.
  const Bpe bpe =
      MakeBpe(R"({"vocab":{"a":0,"b":1,"c":2,"ab":3,"bc":4},"merges":["a b","b c","a b"]})");
  EXPECT_EQ(Encode(bpe, "abc"), (std::vector<int32_t>{0, 4}));
}

TEST(Bpe, IgnoreMergesTakesWholePieces) {
  const Bpe bpe = MakeBpe(R"({"vocab":{"a":0,"b":1,"aba":2},"merges":[],"ignore_merges":true})");
  EXPECT_EQ(Encode(bpe, "aba"), (std::vector<int32_t>{2}));
  EXPECT_EQ(Encode(bpe, "abab"), (std::vector<int32_t>{0, 1, 0, 1}));
}

TEST(Bpe, ByteFallbackNeedsAllBytes) {
  const std::string vocab = R"("vocab":{"a":0,"<unk>":1,"<0xC3>":2,"<0xA9>":3,"<0xE2>":4},)";
  const Bpe bpe = MakeBpe("{" + vocab + R"("merges":[],"unk_token":"<unk>","byte_fallback":true})");
  EXPECT_EQ(Encode(bpe, "a\u00e9"), (std::vector<int32_t>{0, 2, 3}));
  EXPECT_EQ(Encode(bpe, "\u2603\u2603"), (std::vector<int32_t>{1, 1}));
}

TEST(WordCache, ForgetsRatherThanGrows) {
  WordCache cache;
  std::vector<int32_t> ids;
  for (int i = 0; i < 100000; ++i) {
    const std::string word = "word that is longer than a slot " + std::to_string(i);
    const std::vector<int32_t> inserted(static_cast<size_t>(i % 12), i);
    ids.clear();
    ASSERT_FALSE(cache.Find(1, word, ids));
    cache.Insert(1, word, inserted);
    ASSERT_TRUE(cache.Find(1, word, ids));
    ASSERT_EQ(ids, inserted);
    ASSERT_FALSE(cache.Find(2, word, ids));
  }
}

}  // namespace
}  // namespace winnow::tok
