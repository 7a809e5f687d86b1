#include "text/block_builder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "base/error.h"
#include "checkpoint/safetensors_file.h"
#include "checkpoint/safetensors_writer.h"
#include "checkpoint/test_folder.h"
#include "text/document_blocks.h"

namespace winnow {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

const fs::path kData = fs::path(WINNOW_TEST_DATA) / "text";

TextSource Source(const fs::path& path) {
  return ParseTextSource(path.string());
}

// The tokenizer of the tiny reference model: byte b is id 3 + b, 1 is BOS.
std::vector<int32_t> EncodeBytes(std::string_view text, bool with_special = true) {
  std::vector<int32_t> ids;
  if (with_special) ids.push_back(1);
  for (const char c : text) ids.push_back(3 + static_cast<unsigned char>(c));
  return ids;
}

std::vector<int32_t> ExpectedIds(const std::string& name) {
  const SafetensorsFile file = SafetensorsFile::Open(kData / "naee-ids.safetensors");
  const TensorInfo& tensor = file.Get(name);
  std::vector<int32_t> ids(tensor.bytes / 4);
  file.Read(tensor, std::as_writable_bytes(std::span(ids)));
  return ids;
}

// numpy.random.default_rng(seed).permutation(n), NumPy 2.4.6.
TEST(NumpyPermutation, EqualsNumpy) {
  EXPECT_THAT(NumpyPermutation(42, 0), ElementsAre());
  EXPECT_THAT(NumpyPermutation(42, 1), ElementsAre(0));
  EXPECT_THAT(NumpyPermutation(42, 2), ElementsAre(1, 0));
  EXPECT_THAT(NumpyPermutation(42, 3), ElementsAre(2, 1, 0));
  EXPECT_THAT(NumpyPermutation(0, 10), ElementsAre(4, 6, 2, 7, 3, 5, 9, 0, 8, 1));
  EXPECT_THAT(NumpyPermutation(1, 10), ElementsAre(8, 4, 7, 0, 1, 2, 5, 9, 6, 3));
  EXPECT_THAT(NumpyPermutation(42, 10), ElementsAre(5, 6, 0, 7, 3, 2, 4, 9, 1, 8));
  EXPECT_THAT(NumpyPermutation((1ull << 32) + 5, 10), ElementsAre(6, 7, 4, 2, 5, 0, 9, 8, 3, 1));
  EXPECT_THAT(NumpyPermutation(UINT64_MAX, 10), ElementsAre(8, 7, 3, 0, 4, 6, 1, 2, 5, 9));
  struct Case {
    uint64_t seed;
    int64_t n;
    int64_t first;
    uint64_t weighted_sum;  // sum of p[i] * (i + 1)
  };
  for (const Case& c : std::vector<Case>{{0, 399, 133, 15801659},
                                         {0, 1000, 459, 250930667},
                                         {0, 100000, 18836, 249975423284886},
                                         {1, 399, 378, 16353992},
                                         {1, 1000, 705, 246397518},
                                         {1, 100000, 64959, 250016781717170},
                                         {42, 399, 301, 15311208},
                                         {42, 1000, 978, 248821039},
                                         {42, 100000, 45262, 249157033702609},
                                         {4294967301, 399, 277, 15577833},
                                         {4294967301, 1000, 381, 251175399},
                                         {4294967301, 100000, 95034, 249714417334428}}) {
    const std::vector<int64_t> permutation = NumpyPermutation(c.seed, c.n);
    uint64_t sum = 0;
    for (size_t i = 0; i < permutation.size(); ++i) {
      sum += static_cast<uint64_t>(permutation[i]) * (i + 1);
    }
    EXPECT_EQ(permutation[0], c.first) << c.seed << " " << c.n;
    EXPECT_EQ(sum, c.weighted_sum) << c.seed << " " << c.n;
  }
}

TEST(DocumentBlocks, EqualThePublishedProgramsBlocks) {
  const TokenSequences blocks =
      BlocksFromDocuments(Source(kData / "naee-calibration-texts.jsonl.xz"), EncodeBytes,
                          {.num_blocks = 16, .block_tokens = 256});
  EXPECT_EQ(blocks.ids, ExpectedIds("tiny"));
  EXPECT_EQ(blocks.size(), 16);
  EXPECT_EQ(blocks.offsets.back(), 16 * 256);
}

TEST(BuildBlocks, EqualThePublishedProgramsBlocksWithARealTokenizer) {
  const Tokenizer tokenizer =
      Tokenizer::Load(fs::path(WINNOW_SOURCE_DIR) / "examples/sample-mixtral");
  const std::vector<SourceBlocks> blocks =
      BuildBlocks({Source(kData / "naee-calibration-texts.jsonl.xz")}, &tokenizer,
                  {.num_blocks = 32, .block_tokens = 256});
  ASSERT_EQ(blocks.size(), 1u);
  EXPECT_EQ(blocks[0].name, "naee-calibration-texts");
  EXPECT_EQ(blocks[0].sequences.ids, ExpectedIds("sample"));
}

// The algorithm as the header states it, without rounds and two passes.
std::vector<int32_t> SimpleBlocks(const std::vector<std::string>& documents, int64_t num_blocks,
                                  int64_t block_tokens) {
  const std::vector<int64_t> order = NumpyPermutation(42, static_cast<int64_t>(documents.size()));
  const size_t kept = std::min<size_t>(order.size(), static_cast<size_t>(16 * num_blocks));
  std::vector<int32_t> blocks;
  for (size_t group = 0; group < kept; group += 1000) {
    std::vector<int32_t> ids;
    for (size_t i = group; i < std::min(kept, group + 1000); ++i) {
      const std::vector<int32_t> one = EncodeBytes(documents[static_cast<size_t>(order[i])]);
      ids.insert(ids.end(), one.begin(), one.end());
    }
    ids.resize(ids.size() / static_cast<size_t>(block_tokens) * static_cast<size_t>(block_tokens));
    blocks.insert(blocks.end(), ids.begin(), ids.end());
  }
  blocks.resize(std::min(blocks.size(), static_cast<size_t>(num_blocks * block_tokens)));
  return blocks;
}

class BlocksTest : public testing::Test {
 protected:
  // Documents of `shortest` to `longest` bytes.
  fs::path WriteDocuments(int count, int shortest, int longest) {
    documents_.clear();
    std::string text;
    for (int i = 0; i < count; ++i) {
      documents_.push_back(
          std::string(static_cast<size_t>(shortest + i * 7919 % (longest - shortest + 1)),
                      static_cast<char>('a' + i % 26)));
      text += documents_.back() + "\n<|endoftext|>\n";
    }
    return folder_.Write("many.txt", text);
  }
  TestFolder folder_;
  std::vector<std::string> documents_;
};

TEST_F(BlocksTest, GroupsOfAThousandDocumentsDropTheirTails) {
  const TextSource source = Source(WriteDocuments(2500, 3, 3));  // 4 tokens a document with BOS
  const std::vector<int32_t> expected = SimpleBlocks(documents_, 1'000'000, 63);
  const auto all = static_cast<int64_t>(expected.size()) / 63;
  ASSERT_EQ(all, 63 + 63 + 31);  // the three tails would make one more
  const auto blocks = [&](int64_t num_blocks) {
    return BlocksFromDocuments(source, EncodeBytes, {.num_blocks = num_blocks, .block_tokens = 63});
  };
  EXPECT_EQ(blocks(all).ids, expected);
  for (const int64_t num_blocks : {1, 62, 63, 64, 126, 127}) {
    EXPECT_EQ(blocks(num_blocks).ids, SimpleBlocks(documents_, num_blocks, 63)) << num_blocks;
  }
  try {
    blocks(all + 1);
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(),
                HasSubstr("2,500 documents give 157 blocks of 63 tokens, 158 are wanted"));
  }
}

TEST_F(BlocksTest, OnlySixteenDocumentsABlockAreKept) {
  const TextSource source = Source(WriteDocuments(100, 1, 2));
  // 3 blocks keep 48 documents of 2 to 3 tokens, too few for 3 x 64 tokens.
  EXPECT_EQ(SimpleBlocks(documents_, 3, 64).size(), 64u);
  EXPECT_THROW(BlocksFromDocuments(source, EncodeBytes, {.num_blocks = 3, .block_tokens = 64}),
               UsageError);
  EXPECT_EQ(BlocksFromDocuments(source, EncodeBytes, {.num_blocks = 3, .block_tokens = 20}).ids,
            SimpleBlocks(documents_, 3, 20));
}

TEST_F(BlocksTest, ATokenizerOfLongTokensTakesSeveralRounds) {
  const TextSource source = Source(WriteDocuments(400, 1, 300));
  const EncodeFunction one_token = [](std::string_view text, bool) {
    return std::vector<int32_t>{static_cast<int32_t>(text.size())};
  };
  const TokenSequences blocks =
      BlocksFromDocuments(source, one_token, {.num_blocks = 25, .block_tokens = 16});
  const std::vector<int64_t> order = NumpyPermutation(42, 400);
  for (size_t i = 0; i < 400; ++i) {
    ASSERT_EQ(blocks.ids[i],
              static_cast<int32_t>(documents_[static_cast<size_t>(order[i])].size()));
  }
}

TEST_F(BlocksTest, ExcerptsSpreadOverDocumentsUntilThereAreEnough) {
  std::string text;  // ten documents of 3,000 letters, each its own, cut into words
  for (char c = 'a'; c <= 'j'; ++c) {
    for (int i = 0; i < 300; ++i) text += std::string(9, c) + " ";
    text += "\n<|endoftext|>\n";
  }
  const TextSource source = Source(folder_.Write("letters.txt", text));
  BlockOptions options{.num_blocks = 8, .block_tokens = 100, .blocks_per_document = 1};
  const TokenSequences one = BlocksFromDocuments(source, EncodeBytes, options);
  ASSERT_EQ(one.size(), 8);
  std::set<int32_t> letters;
  for (int64_t b = 0; b < 8; ++b) {
    EXPECT_EQ(one.ids[static_cast<size_t>(100 * b)], 1);  // each begins as a document does
    letters.insert(one.ids[static_cast<size_t>(100 * b + 1)]);
  }
  EXPECT_EQ(letters.size(), 8U);
  options.num_blocks = 25;  // ten documents: three blocks of some
  EXPECT_EQ(BlocksFromDocuments(source, EncodeBytes, options).size(), 25);
  options.num_blocks = 400;  // more than there is
  EXPECT_THROW(BlocksFromDocuments(source, EncodeBytes, options), UsageError);
}

TEST(DivideByShares, LargestRemainders) {
  EXPECT_THAT(DivideByShares(128, {1}), ElementsAre(128));
  EXPECT_THAT(DivideByShares(128, {1, 1, 1}), ElementsAre(43, 43, 42));
  EXPECT_THAT(DivideByShares(10, {2, 1, 1}), ElementsAre(5, 3, 2));
  EXPECT_THAT(DivideByShares(1, {1, 2}), ElementsAre(0, 1));
  EXPECT_THAT(DivideByShares(7, {0.1, 0.2, 0.4}), ElementsAre(1, 2, 4));
  EXPECT_THAT(DivideByShares(3, {1e308, 1e308}), ElementsAre(2, 1));
}

TEST_F(BlocksTest, IdFilesNeedNoTokenizerAndNamesStayApart) {
  const std::array<int32_t, 6> ids = {1, 2, 3, 4, 5, 6};
  for (const char* folder : {"a", "b"}) {
    fs::create_directories(folder_.path() / folder);
    WriteSafetensors(
        folder_.path() / folder / "x.safetensors",
        std::vector<TensorData>{{"input_ids", Dtype::kI32, {2, 3}, std::as_bytes(std::span(ids))}});
  }
  const auto blocks = BuildBlocks(
      {Source(folder_.path() / "a/x.safetensors"), Source(folder_.path() / "b/x.safetensors")},
      nullptr, {.num_blocks = 0});
  ASSERT_EQ(blocks.size(), 2u);
  EXPECT_EQ(blocks[0].name, "x");
  EXPECT_EQ(blocks[1].name, "x-2");
  EXPECT_THAT(blocks[1].sequences.ids, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(blocks[1].sequences.offsets, ElementsAre(0, 3, 6));
}

// Answers alone count: of each line `prompt`, `completion` a 1 for BOS and a byte a token.
TEST_F(BlocksTest, TokensOfPromptsHaveNoWeight) {
  const fs::path path = folder_.Write("answers.jsonl",
                                      "{\"prompt\": \"ab\", \"completion\": \"cde\"}\n"
                                      "{\"prompt\": \"ab\", \"completion\": \"cde\"}\n");
  const TokenSequences blocks =
      BlocksFromDocuments(Source(path), EncodeBytes, {.num_blocks = 2, .block_tokens = 6});
  EXPECT_EQ(blocks.ids,
            (std::vector<int32_t>{1, 100, 101, 102, 103, 104, 1, 100, 101, 102, 103, 104}));
  EXPECT_EQ(blocks.weights, (std::vector<float>{0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1}));
  EXPECT_THROW(BlocksFromDocuments(Source(path), EncodeBytes, {.num_blocks = 1, .block_tokens = 3}),
               UsageError);
}

TEST_F(BlocksTest, ConversationsBringTheirWeights) {
  const fs::path path = folder_.Write("talks.jsonl", "{\"messages\": [1]}\n{\"messages\": [1]}\n");
  const auto conversation = [](std::string_view, const std::string&) {
    return CountedIds{{5, 6, 7}, {0, 1, 0}};
  };
  const TokenSequences blocks = BlocksFromDocuments(
      Source(path), EncodeBytes, {.num_blocks = 2, .block_tokens = 3}, conversation);
  EXPECT_THAT(blocks.ids, ElementsAre(5, 6, 7, 5, 6, 7));
  EXPECT_THAT(blocks.weights, ElementsAre(0, 1, 0, 0, 1, 0));
  EXPECT_THROW(BlocksFromDocuments(Source(path), EncodeBytes, {.num_blocks = 1, .block_tokens = 3}),
               UsageError);
}

}  // namespace
}  // namespace winnow
