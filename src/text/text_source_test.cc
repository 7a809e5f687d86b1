#include "text/text_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>

#include <limits>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "checkpoint/test_folder.h"

namespace winnow {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::string PackXz(const std::string& text, uint32_t preset = 6) {
  std::string out(lzma_stream_buffer_bound(text.size()), '\0');
  size_t size = 0;
  EXPECT_EQ(lzma_easy_buffer_encode(preset, LZMA_CHECK_CRC64, nullptr,
                                    reinterpret_cast<const uint8_t*>(text.data()), text.size(),
                                    reinterpret_cast<uint8_t*>(out.data()), &size, out.size()),
            LZMA_OK);
  out.resize(size);
  return out;
}
std::string PackZstd(const std::string& text, int window_log = 0) {
  std::string out(ZSTD_compressBound(text.size()) + 64, '\0');
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  if (window_log > 0) {
    ZSTD_CCtx_setParameter(context, ZSTD_c_windowLog, window_log);
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0);
  }
  ZSTD_inBuffer input{text.data(), text.size(), 0};
  ZSTD_outBuffer output{out.data(), out.size(), 0};
  if (window_log > 0) ZSTD_compressStream2(context, &output, &input, ZSTD_e_flush);
  EXPECT_EQ(ZSTD_compressStream2(context, &output, &input, ZSTD_e_end), 0u);
  ZSTD_freeCCtx(context);
  out.resize(output.pos);
  return out;
}
std::string PackGzip(const std::string& text) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

class TextSourceTest : public testing::Test {
 protected:
  std::vector<std::string> Read(const std::string& name, std::string_view content,
                                const std::string& field = "text") {
    const TextSource source = ParseTextSource(folder_.Write(name, content).string());
    std::vector<std::string> documents;
    ReadDocuments(source, field, [&](std::string document) {
      documents.push_back(std::move(document));
      return true;
    });
    return documents;
  }
  std::string ReadError(const std::string& name, std::string_view content,
                        const std::string& field = "text") {
    return ModelErrorOf([&] { Read(name, content, field); });
  }
  TestFolder folder_;
};

TEST_F(TextSourceTest, ArgumentsAndShares) {
  const TextSource plain = ParseTextSource("a/b/prose.txt.xz");
  EXPECT_EQ(plain.path, "a/b/prose.txt.xz");
  EXPECT_EQ(plain.name, "prose");
  EXPECT_EQ(plain.share, 1.0);
  EXPECT_FALSE(plain.is_token_ids);
  const TextSource shared = ParseTextSource("a/code.v2.jsonl.zst:2.5");
  EXPECT_EQ(shared.path, "a/code.v2.jsonl.zst");
  EXPECT_EQ(shared.name, "code.v2");
  EXPECT_EQ(shared.share, 2.5);
  EXPECT_TRUE(ParseTextSource("ids.safetensors").is_token_ids);
  EXPECT_EQ(ParseTextSource("x:y/prose.txt").path, "x:y/prose.txt");
  const fs::path odd = folder_.Write("prose.txt:2.txt", "x");
  EXPECT_EQ(ParseTextSource(odd.string()).path, odd);
  EXPECT_EQ(ParseTextSource(odd.string() + ":3").share, 3.0);
  for (const char* bad : {"a.txt:", "a.txt:x", "a.txt:0", "a.txt:-1", "a.txt:nan", "a.txt:inf",
                          "a.txt:2x", "a.pdf", "a", ".txt", "a.safetensors.xz", ""}) {
    SCOPED_TRACE(bad);
    EXPECT_THROW(ParseTextSource(bad), UsageError);
  }
}

TEST_F(TextSourceTest, SeparatorLines) {
  const std::string text =
      "one\ntwo\n<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\nx <|endoftext|>\n <|endoftext|>\n"
      "three\n\n<|endoftext|>\nlast";
  const auto expected = ElementsAre("one\ntwo", "x <|endoftext|>\n <|endoftext|>\nthree\n", "last");
  EXPECT_THAT(Read("a.txt", text), expected);
  EXPECT_THAT(Read("a.txt", text + "\n"), expected);
  EXPECT_THAT(Read("a.txt", text + "\n<|endoftext|>"), expected);
  EXPECT_THAT(Read("a.txt", text + "\n<|endoftext|>\n"), expected);
  EXPECT_THAT(Read("a.txt", ""), IsEmpty());
  EXPECT_THAT(Read("a.txt", "\n"), IsEmpty());
  EXPECT_THAT(Read("a.txt",
                   "\xef\xbb\xbf"
                   "a\n"),
              ElementsAre("a"));
}

TEST_F(TextSourceTest, StopsWhenAskedTo) {
  const TextSource source =
      ParseTextSource(folder_.Write("a.txt", "1\n<|endoftext|>\n2\n<|endoftext|>\n\xff").string());
  int count = 0;
  ReadDocuments(source, "text", [&](const std::string&) { return ++count < 2; });
  EXPECT_EQ(count, 2);
}

TEST_F(TextSourceTest, DocumentsAcrossBuffers) {
  std::string text;
  std::vector<std::string> expected;
  for (int i = 0; i < 300; ++i) {  // about 4 MB, four buffers
    expected.push_back(std::string(static_cast<size_t>(i * 97), static_cast<char>('a' + i % 26)) +
                       std::to_string(i));
    text += expected.back() + "\n<|endoftext|>\n";
  }
  EXPECT_EQ(Read("a.txt", text), expected);
  EXPECT_EQ(Read("a.txt.xz", PackXz(text)), expected);
  EXPECT_EQ(Read("a.txt.zst", PackZstd(text)), expected);
  EXPECT_EQ(Read("a.txt.gz", PackGzip(text)), expected);
}

TEST_F(TextSourceTest, ArchivesOneAfterTheOther) {
  const std::string first = "one\n<|endo";
  const std::string second = "ftext|>\ntwo\n";
  const auto expected = ElementsAre("one", "two");
  EXPECT_THAT(Read("a.txt.xz", PackXz(first) + PackXz("") + PackXz(second)), expected);
  EXPECT_THAT(Read("a.txt.zst", PackZstd(first) + PackZstd("") + PackZstd(second)), expected);
  EXPECT_THAT(Read("a.txt.gz", PackGzip(first) + PackGzip("") + PackGzip(second)), expected);
}

TEST_F(TextSourceTest, DamagedArchives) {
  std::string text;
  for (int i = 0; i < 20'000; ++i) text += std::to_string(i * 7919) + "\n";
  for (const auto& [name, packed] :
       {std::pair{"a.txt.xz", PackXz(text)}, std::pair{"a.txt.zst", PackZstd(text)},
        std::pair{"a.txt.gz", PackGzip(text)}}) {
    SCOPED_TRACE(name);
    for (const size_t length : {size_t{0}, size_t{3}, packed.size() / 2, packed.size() - 1}) {
      SCOPED_TRACE(length);
      EXPECT_THAT(ReadError(name, std::string_view(packed).substr(0, length)),
                  HasSubstr("cut off"));
    }
    EXPECT_THAT(ReadError(name, text), HasSubstr("damaged"));
    EXPECT_THAT(ReadError(name, packed + "trailing bytes"), HasSubstr("damaged"));
    std::string flipped = packed;
    flipped[packed.size() / 2] ^= 0x10;
    EXPECT_THAT(ReadError(name, flipped), HasSubstr(name));
  }
}

TEST_F(TextSourceTest, RefusesArchivesThatNeedTooMuchMemory) {
  lzma_options_lzma options;
  ASSERT_FALSE(lzma_lzma_preset(&options, 0));
  options.dict_size = 256u << 20;
  const lzma_filter filters[] = {{LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, nullptr}};
  std::string packed(1000, '\0');
  size_t size = 0;
  ASSERT_EQ(
      lzma_stream_buffer_encode(const_cast<lzma_filter*>(filters), LZMA_CHECK_CRC64, nullptr,
                                reinterpret_cast<const uint8_t*>("hello"), 5,
                                reinterpret_cast<uint8_t*>(packed.data()), &size, packed.size()),
      LZMA_OK);
  EXPECT_THAT(ReadError("a.txt.xz", packed.substr(0, size)), HasSubstr("128 MiB"));
  EXPECT_THAT(ReadError("a.txt.zst", PackZstd("hello", 28)), HasSubstr("128 MiB"));
}

TEST_F(TextSourceTest, RefusesWhatIsNotUtf8) {
  EXPECT_THAT(ReadError("a.txt", "one\n<|endoftext|>\ncaf\xe9\n"),
              AllOf(HasSubstr("a.txt"), HasSubstr("byte 0xe9 at byte 21")));
  EXPECT_THAT(ReadError("a.jsonl", "{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n"),
              HasSubstr("byte 0xff at byte 22"));
}

TEST_F(TextSourceTest, JsonLines) {
  const std::string lines =
      "{\"text\":\"one\\nline \\u00e9\",\"id\":1}\n\n  \r\n{\"id\":2,\"text\":\"two\"}\r\n"
      "{\"text\":\"\"}\n{\"text\":\"three\"}";
  const auto expected = ElementsAre("one\nline é", "two", "three");
  EXPECT_THAT(Read("a.jsonl", lines), expected);
  EXPECT_THAT(Read("a.jsonl.gz", PackGzip(lines)), expected);
  EXPECT_THAT(Read("a.jsonl", R"({"content":"x"})", "content"), ElementsAre("x"));
  EXPECT_THAT(Read("a.jsonl", "\xef\xbb\xbf{\"text\":\"x\"}"), ElementsAre("x"));
}

TEST_F(TextSourceTest, DamagedJsonLines) {
  EXPECT_THAT(ReadError("a.jsonl", "{\"text\":\"a\"}\n{\"text\":\"b\"\n"), HasSubstr("line 2"));
  EXPECT_THAT(ReadError("a.jsonl", "[1]\n"), HasSubstr("line 1: expected an object"));
  EXPECT_THAT(ReadError("a.jsonl", "{\"text\":1}\n"), HasSubstr("is number, expected a string"));
  EXPECT_THAT(ReadError("a.jsonl", "{\"text\":\"a\"}\n{}"), HasSubstr("the line has none"));
  try {
    Read("a.jsonl", "\n{\"id\":1,\"content\":\"x\"}\n");
    FAIL();
  } catch (const ModelError& e) {
    EXPECT_THAT(e.what(), HasSubstr("line 2: no key \"text\", the line has \"content\", \"id\""));
    EXPECT_THAT(e.hint(), HasSubstr("did you mean the key \"content\"?"));
  }
}

TEST_F(TextSourceTest, MissingFile) {
  const TextSource source = ParseTextSource((folder_.path() / "none.txt.xz").string());
  EXPECT_THROW(ReadDocuments(source, "text", [](const std::string&) { return true; }),
               RuntimeError);
}

TEST_F(TextSourceTest, Utf8AsRfc3629DefinesIt) {
  const std::string valid =
      "\xc2\x80\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xf0\x90\x80\x80\xf4\x8f\xbf\xbf";
  EXPECT_THAT(Read("a.txt", valid), ElementsAre(valid));
  for (const char* invalid : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80",
                              "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff",
                              "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xe2\x82x", "\xc3\xc3"}) {
    EXPECT_THAT(ReadError("a.txt", std::string("12345678é") + invalid), HasSubstr("at byte 10 of"))
        << invalid;
  }
}

class TokenIdsTest : public testing::Test {
 protected:
  template <class T>
  TokenSequences Read(Dtype dtype, std::vector<uint64_t> shape, std::vector<T> ids,
                      std::vector<int64_t> offsets = {}) {
    std::vector<TensorData> tensors = {
        {"input_ids", dtype, std::move(shape), std::as_bytes(std::span(ids))}};
    if (!offsets.empty()) {
      tensors.push_back(
          {"offsets", Dtype::kI64, {offsets.size()}, std::as_bytes(std::span(offsets))});
    }
    WriteSafetensors(folder_.path() / "ids.safetensors", tensors);
    return ReadTokenIds(folder_.path() / "ids.safetensors");
  }
  TestFolder folder_;
};

TEST_F(TokenIdsTest, RowsAndOffsets) {
  const TokenSequences rows = Read<int32_t>(Dtype::kI32, {2, 3}, {1, 2, 3, 4, 5, 6});
  EXPECT_THAT(rows.ids, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(rows.offsets, ElementsAre(0, 3, 6));
  EXPECT_EQ(rows.size(), 2);
  const TokenSequences ragged = Read<int64_t>(Dtype::kI64, {4}, {7, 8, 9, 2147483647}, {0, 1, 4});
  EXPECT_THAT(ragged.ids, ElementsAre(7, 8, 9, 2147483647));
  EXPECT_THAT(ragged.offsets, ElementsAre(0, 1, 4));
  std::vector<int64_t> many(20'000);  // more than one buffer
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int64_t>(i);
  EXPECT_EQ(Read<int64_t>(Dtype::kI64, {1, many.size()}, many).ids.back(), 19'999);
}

TEST_F(TokenIdsTest, Refusals) {
  const auto error = [&](auto... arguments) {
    return ModelErrorOf([&] { Read<int64_t>(arguments...); });
  };
  using Shape = std::vector<uint64_t>;
  using Ids = std::vector<int64_t>;
  EXPECT_THAT(error(Dtype::kI64, Shape{1, 2}, Ids{1, -1}), HasSubstr("input_ids[1] is -1"));
  EXPECT_THAT(error(Dtype::kI64, Shape{1, 1}, Ids{1ll << 31}), HasSubstr("2147483648"));
  EXPECT_THAT(error(Dtype::kU64, Shape{1, 1}, Ids{1}), HasSubstr("expected I32 or I64"));
  EXPECT_THAT(error(Dtype::kI64, Shape{2}, Ids{1, 2}), HasSubstr("without offsets"));
  EXPECT_THAT(error(Dtype::kI64, Shape{1, 2}, Ids{1, 2}, Ids{0, 2}), HasSubstr("with offsets"));
  EXPECT_THAT(error(Dtype::kI64, Shape{0, 2}, Ids{}), HasSubstr("is empty"));
  EXPECT_THAT(error(Dtype::kI64, Shape{2}, Ids{1, 2}, Ids{0}), HasSubstr("expected [n + 1]"));
  for (const Ids& offsets : {Ids{1, 2}, Ids{0, 1}, Ids{0, 3}, Ids{0, 0, 2}, Ids{0, 2, 1},
                             Ids{0, -1, 2}, Ids{0, INT64_MIN}}) {
    EXPECT_THAT(error(Dtype::kI64, Shape{2}, Ids{1, 2}, offsets), HasSubstr("offsets"));
  }
  WriteSafetensors(folder_.path() / "ids.safetensors", {});
  EXPECT_THAT(ModelErrorOf([&] { ReadTokenIds(folder_.path() / "ids.safetensors"); }),
              HasSubstr("no tensor input_ids"));
}

// Answers to prompts are for calibration; where plain text is read, their key is missing.
TEST_F(TextSourceTest, PromptedLinesAreReadWhereAnswersCount) {
  const fs::path path = folder_.Write("a.jsonl", "{\"prompt\": \"ab\", \"completion\": \"c\"}\n");
  const TextSource source = ParseTextSource(path.string());
  std::vector<Document> documents;
  const auto keep = [&](Document document) {
    documents.push_back(std::move(document));
    return true;
  };
  ReadPromptedDocuments(source, "text", keep);
  ASSERT_EQ(documents.size(), 1U);
  EXPECT_EQ(documents[0].text, "abc");
  EXPECT_EQ(documents[0].prompt_bytes, 2U);
  EXPECT_THAT(ModelErrorOf([&] { ReadPromptedDocuments(source, "txet", keep); }),
              HasSubstr("no key \"txet\""));
  EXPECT_THAT(
      ModelErrorOf([&] { ReadDocuments(source, "text", [](const std::string&) { return true; }); }),
      HasSubstr("no key \"text\""));
}

TEST_F(TextSourceTest, ConversationsAreHandedOnAsTheyAre) {
  const std::string line = R"({"messages": [{"role": "user", "content": "a"}], "id": 1})";
  const fs::path path = folder_.Write("a.jsonl", "\n" + line + "\n");
  const TextSource source = ParseTextSource(path.string());
  std::vector<Document> documents;
  const auto keep = [&](Document document) {
    documents.push_back(std::move(document));
    return true;
  };
  ReadPromptedDocuments(source, "text", keep);
  ASSERT_EQ(documents.size(), 1U);
  EXPECT_TRUE(documents[0].is_conversation);
  EXPECT_EQ(ParseJson(documents[0].text, "line"), ParseJson(line, "line"));
  EXPECT_THAT(documents[0].where, HasSubstr("a.jsonl: line 2"));
  const auto encode = [](std::string_view, bool) { return std::vector<int32_t>{9}; };
  EXPECT_THROW(EncodeDocument(documents[0], encode, {}), UsageError);
  const auto conversation = [](std::string_view, const std::string&) {
    return CountedIds{{1, 2}, {0, 1}};
  };
  EXPECT_THAT(EncodeDocument(documents[0], encode, conversation).ids, ElementsAre(1, 2));
  EXPECT_THAT(
      ModelErrorOf([&] { ReadDocuments(source, "text", [](const std::string&) { return true; }); }),
      HasSubstr("no key \"text\""));
}

// `mask`: what each token counts for, in any type that has numbers or truth values.
TEST_F(TokenIdsTest, MasksWeighTokens) {
  const std::vector<int32_t> ids = {1, 2, 3, 4};
  const auto write = [&](Dtype dtype, auto mask, std::vector<uint64_t> shape) {
    const std::vector<TensorData> tensors = {
        {"input_ids", Dtype::kI32, {2, 2}, std::as_bytes(std::span(std::as_const(ids)))},
        {"mask", dtype, std::move(shape), std::as_bytes(std::span(std::as_const(mask)))}};
    WriteSafetensors(folder_.path() / "ids.safetensors", tensors);
    return [&] { return ReadTokenIds(folder_.path() / "ids.safetensors"); };
  };
  EXPECT_THAT(write(Dtype::kU8, std::vector<uint8_t>{0, 1, 1, 0}, {2, 2})().weights,
              ElementsAre(0, 1, 1, 0));
  EXPECT_THAT(write(Dtype::kBool, std::vector<uint8_t>{0, 1, 1, 0}, {2, 2})().weights,
              ElementsAre(0, 1, 1, 0));
  EXPECT_THAT(write(Dtype::kI64, std::vector<int64_t>{3, 0, 0, 1}, {2, 2})().weights,
              ElementsAre(3, 0, 0, 1));
  EXPECT_THAT(write(Dtype::kF32, std::vector<float>{0.5f, 0, 0, 1}, {2, 2})().weights,
              ElementsAre(0.5f, 0, 0, 1));
  EXPECT_THAT(ModelErrorOf(write(Dtype::kF32, std::vector<float>{-1, 0, 0, 1}, {2, 2})),
              HasSubstr("mask[0]"));
  EXPECT_THAT(ModelErrorOf(write(Dtype::kF32, std::vector<float>{NAN, 0, 0, 1}, {2, 2})),
              HasSubstr("mask[0]"));
  for (const float wrong : {1e7f, 1e-7f, std::numeric_limits<float>::infinity()}) {
    EXPECT_THAT(ModelErrorOf(write(Dtype::kF32, std::vector<float>{wrong, 0, 0, 1}, {2, 2})),
                HasSubstr("mask[0]"));
  }
  EXPECT_THAT(ModelErrorOf(write(Dtype::kU8, std::vector<uint8_t>{0, 0, 0, 0}, {2, 2})),
              HasSubstr("counts no token"));
  EXPECT_THAT(ModelErrorOf(write(Dtype::kU8, std::vector<uint8_t>{0, 1, 1, 0}, {4})),
              HasSubstr("mask"));
  EXPECT_THAT(ModelErrorOf(write(Dtype::kF16, std::vector<uint16_t>{0, 1, 1, 0}, {2, 2})),
              HasSubstr("mask"));
}

}  // namespace
}  // namespace winnow
