#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/safetensors_file.h"
#include "checkpoint/safetensors_header.h"
#include "checkpoint/safetensors_writer.h"
#include "checkpoint/test_folder.h"

namespace winnow {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const fs::path kData = fs::path(WINNOW_TEST_DATA) / "checkpoint";

// A header whose data has `data_bytes` bytes.
std::string HeaderError(const std::string& json, uint64_t data_bytes) {
  return ModelErrorOf([&] { ParseSafetensorsHeader(json, 8 + json.size() + data_bytes, "f"); });
}
SafetensorsHeader Parse(const std::string& json, uint64_t data_bytes) {
  return ParseSafetensorsHeader(json, 8 + json.size() + data_bytes, "f");
}
std::string Entry(const std::string& fields) {
  return "{\"a\":{" + fields + "}}";
}

TEST(SafetensorsFile, ReadsWhatTheLibraryWrote) {
  const SafetensorsFile file = SafetensorsFile::Open(kData / "library.safetensors");
  EXPECT_THAT(file.metadata(), ElementsAre(std::pair("format", "pt")));
  std::vector<std::string> names;
  for (const TensorInfo& tensor : file.tensors()) names.push_back(tensor.name);
  EXPECT_THAT(names, ElementsAre("ids", "empty", "model.embed_tokens.weight", "scalar",
                                 "model.norm.weight", "größe \"x\"", "flag"));
  const TensorInfo& ids = file.Get("ids");
  EXPECT_EQ(ids.Describe(), "I64 [2, 2]");
  std::array<int64_t, 4> values{};
  file.Read(ids, std::as_writable_bytes(std::span(values)));
  EXPECT_THAT(values, ElementsAre(1, 2, 3, -4));

  const TensorInfo& embedding = file.Get("model.embed_tokens.weight");
  std::array<float, 4> row{};
  file.ReadPart(embedding, 16, std::as_writable_bytes(std::span(row)));
  EXPECT_THAT(row, ElementsAre(4.0f, 5.0f, 6.0f, 7.0f));
  std::array<uint16_t, 3> halves{};  // at an odd offset: nothing in the format aligns it
  file.Read(file.Get("model.norm.weight"), std::as_writable_bytes(std::span(halves)));
  EXPECT_THAT(halves, ElementsAre(0x3e00, 0xc000, 0x3400));
  EXPECT_TRUE(file.Get("scalar").shape.empty());
  EXPECT_EQ(file.Get("scalar").bytes, 4u);
  EXPECT_EQ(file.Get("empty").bytes, 0u);
  EXPECT_EQ(file.Find("model"), nullptr);
  EXPECT_THAT(ModelErrorOf([&] { file.Get("lm_head.weight"); }),
              AllOf(HasSubstr("library.safetensors"), HasSubstr("lm_head.weight")));
}

TEST(SafetensorsFile, RefusesReadsBeyondATensor) {
  const SafetensorsFile file = SafetensorsFile::Open(kData / "library.safetensors");
  const TensorInfo& ids = file.Get("ids");
  std::vector<std::byte> buffer(33);
  EXPECT_THROW(file.Read(ids, buffer), RuntimeError);
  EXPECT_THROW(file.ReadPart(ids, 0, buffer), RuntimeError);
  EXPECT_THROW(file.ReadPart(ids, 32, std::span(buffer).first(1)), RuntimeError);
  EXPECT_THROW(file.ReadPart(ids, UINT64_MAX, std::span(buffer).first(2)), RuntimeError);
  EXPECT_NO_THROW(file.ReadPart(ids, 32, std::span(buffer).first(0)));
}

TEST(SafetensorsFile, AcceptsAndRefusesWhatTheLibraryDoes) {
  int accepted = 0;
  int refused = 0;
  for (const auto& entry : fs::directory_iterator(kData / "safetensors")) {
    SCOPED_TRACE(entry.path().filename());
    if (entry.path().filename().string().starts_with("ok")) {
      EXPECT_NO_THROW(SafetensorsFile::Open(entry.path()));
      ++accepted;
    } else {
      EXPECT_THAT(ModelErrorOf([&] { SafetensorsFile::Open(entry.path()); }),
                  HasSubstr(entry.path().string() + ": "));
      ++refused;
    }
  }
  EXPECT_EQ(accepted, 4);
  EXPECT_EQ(refused, 20);
}

TEST(SafetensorsFile, RecognisesAGitLfsPointer) {
  const TestFolder folder;
  const fs::path path = folder.Write("model.safetensors",
                                     "version https://git-lfs.github.com/spec/v1\noid sha256:00\n");
  try {
    SafetensorsFile::Open(path);
    FAIL();
  } catch (const ModelError& e) {
    EXPECT_THAT(e.what(), HasSubstr("Git LFS pointer"));
    EXPECT_THAT(e.hint(), HasSubstr("git lfs pull"));
  }
}

TEST(SafetensorsHeader, NamesTensorExpectedAndGot) {
  EXPECT_EQ(HeaderError(Entry(R"("dtype":"BF16","shape":[2,3],"data_offsets":[0,10])"), 10),
            "f: tensor \"a\": BF16 [2, 3] needs 12 bytes, data_offsets [0, 10] give 10");
  EXPECT_EQ(HeaderError(Entry(R"("dtype":"U8","shape":[12],"data_offsets":[0,12])"), 10),
            "f: tensor \"a\": ends at byte 12 of the data, the file has 10");
}

TEST(SafetensorsHeader, RefusesAnythingOutsideTheGrammar) {
  const std::string rest = R"(,"data_offsets":[0,1])";
  for (const auto& [json, part] : std::vector<std::pair<std::string, std::string>>{
           {"", "does not start with {"},
           {" {}", "does not start with {"},
           {"{} x", "not valid JSON"},
           {std::string("{}\0", 3), "zero byte"},
           {"{", "not valid JSON"},
           {R"({"a":null})", "is null"},
           {R"({"a":[]})", "is an array"},
           {R"({"a":{}})", "has no dtype"},
           {Entry(R"("dtype":"U8","shape":[1])"), "has no data_offsets"},
           {Entry(R"("dtype":"U8")" + rest), "has no shape"},
           {Entry(R"("dtype":"U8","dtype":"U8","shape":[1])" + rest), "has dtype twice"},
           {Entry(R"("dtype":"u8","shape":[1])" + rest), "unknown dtype \"u8\""},
           {Entry(R"("dtype":8,"shape":[1])" + rest), "dtype is a number"},
           {Entry(R"("dtype":"U8","shape":1)" + rest), "shape is a number"},
           {Entry(R"("dtype":"U8","shape":[1.0])" + rest), "the number 1.0"},
           {Entry(R"("dtype":"U8","shape":[1e0])" + rest), "the number 1e0"},
           {Entry(R"("dtype":"U8","shape":[-1])" + rest), "a negative number"},
           {Entry(R"("dtype":"U8","shape":["1"])" + rest), "holds a string"},
           {Entry(R"("dtype":"U8","shape":[[1]])" + rest), "holds an array"},
           {Entry(R"("dtype":"U8","shape":[9223372036854775808])" + rest), "below 2^63"},
           {Entry(R"("dtype":"U8","shape":[99999999999999999999])" + rest), "the number 999"},
           {Entry(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1])" + rest), "more than 8 dimensions"},
           {Entry(R"("dtype":"F4","shape":[1])" + rest), "no whole number of bytes"},
           {Entry(R"("dtype":"U8","shape":[1],"data_offsets":[0])"), "has 1 numbers"},
           {Entry(R"("dtype":"U8","shape":[1],"data_offsets":[0,1,2])"), "more than two"},
           {Entry(R"("dtype":"U8","shape":[1],"data_offsets":{})"), "is an object"},
           {Entry(R"("dtype":"U8","shape":[1],"extra":1)" + rest), "unknown key \"extra\""},
           {R"({"__metadata__":{"a":1}})", "is a number, expected a string"},
           {R"({"__metadata__":{"a":{}}})", "is an object, expected a string"},
           {R"({"__metadata__":[]})", "expected an object of strings"},
           {R"({"__metadata__":{"a":"","a":""}})", "twice"},
           {R"({"__metadata__":{},"__metadata__":{}})", "appears twice"},
           {R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[1],)"
            R"("data_offsets":[0,1]}})",
            "\"a\" appears twice"},
       }) {
    SCOPED_TRACE(json);
    EXPECT_THAT(HeaderError(json, 1), HasSubstr(part));
  }
}

TEST(SafetensorsHeader, RefusesNamesNoCheckpointHas) {
  for (const std::string& name :
       {std::string(), std::string("../x"), std::string("a/../b"), std::string("/etc/x"),
        std::string("a\\\\b"), std::string("a\\nb"), std::string("a\\u0000"), std::string("a\x7f"),
        std::string(1001, 'x')}) {
    SCOPED_TRACE(name);
    const std::string json = "{\"" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
    EXPECT_THAT(HeaderError(json, 1), HasSubstr("tensor name"));
  }
}

TEST(SafetensorsHeader, TheDataMustBeCoveredExactly) {
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + first +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
  };
  EXPECT_EQ(Parse(two("[4,8]", "[0,4]"), 8).tensors.front().name, "b");
  EXPECT_THAT(HeaderError(two("[0,4]", "[2,6]"), 8), HasSubstr("overlaps"));
  EXPECT_THAT(HeaderError(two("[0,4]", "[0,4]"), 4), HasSubstr("overlaps"));
  EXPECT_THAT(HeaderError(two("[0,4]", "[5,9]"), 9), HasSubstr("a hole"));
  EXPECT_THAT(HeaderError(two("[1,5]", "[5,9]"), 9), HasSubstr("a hole"));
  EXPECT_THAT(HeaderError(two("[0,4]", "[4,8]"), 9), HasSubstr("1 bytes after the last tensor"));
  EXPECT_THAT(HeaderError("{}", 1), HasSubstr("after the last tensor"));
  EXPECT_TRUE(Parse("{}", 0).tensors.empty());
  EXPECT_THAT(
      HeaderError(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})",
                  0),
      HasSubstr("does not fit in 64 bits"));
  // Several empty tensors at one place, and trailing spaces, are legal.
  EXPECT_EQ(Parse(R"({"b":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},"a":{"dtype":"F32",)"
                  R"("shape":[0],"data_offsets":[0,0]}}   )",
                  0)
                .tensors.size(),
            2u);
}

TEST(SafetensorsHeader, TwentyThousandTensors) {
  std::vector<TensorInfo> tensors(20'000);
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].name = "model.layers." + std::to_string(i / 300) + ".mlp.experts." +
                      std::to_string(i % 300) + ".down_proj.weight";
    tensors[i].dtype = Dtype::kU8;
    tensors[i].shape = {1};
  }
  const std::string header = LayOutSafetensors(tensors, {});
  const SafetensorsHeader parsed = ParseSafetensorsHeader(std::string_view(header).substr(8),
                                                          header.size() + tensors.size(), "f");
  ASSERT_EQ(parsed.tensors.size(), tensors.size());
  for (size_t i = 0; i < tensors.size(); i += 999) {
    EXPECT_EQ(parsed.tensors[i].name, tensors[i].name);
    EXPECT_EQ(parsed.tensors[i].file_offset, header.size() + i);
  }
}

// Re-encoding the library's file must give its bytes.
TEST(LayOutSafetensors, DataCanStartAtTheSamePlaceOfAPage) {
  for (const uint64_t like : {uint64_t{8}, uint64_t{4096}, uint64_t{123456}, uint64_t{8192 + 16}}) {
    std::vector<TensorInfo> tensors(1);
    tensors[0].name = "a";
    tensors[0].shape = {3};
    const std::string header = LayOutSafetensors(tensors, {}, like);
    EXPECT_EQ(tensors[0].file_offset % kPageBytes, like % kPageBytes);
    EXPECT_EQ(header.size(), tensors[0].file_offset);
    EXPECT_LT(header.size(), 2 * kPageBytes);
    uint64_t length = 0;
    std::memcpy(&length, header.data(), sizeof(length));
    EXPECT_EQ(length, header.size() - 8);
  }
  std::vector<TensorInfo> tensors(1);
  tensors[0].name = "a";
  EXPECT_EQ(LayOutSafetensors(tensors, {}, 12345).size() % 8, 0U);  // cannot be matched
}

TEST(SafetensorsWriter, WritesTheBytesTheLibraryWrites) {
  const std::string stored = ReadTextFile(kData / "library.safetensors");
  const SafetensorsFile file = SafetensorsFile::Open(kData / "library.safetensors");
  std::vector<TensorInfo> layout = file.tensors();
  for (TensorInfo& tensor : layout) tensor.file_offset = tensor.bytes = 0;
  const std::string header = LayOutSafetensors(layout, file.metadata());
  EXPECT_EQ(header, stored.substr(0, header.size()));
  EXPECT_EQ(header.size() % 8, 0u);
  for (size_t i = 0; i < layout.size(); ++i) {
    EXPECT_EQ(layout[i].file_offset, file.tensors()[i].file_offset);
    EXPECT_EQ(layout[i].bytes, file.tensors()[i].bytes);
  }
  const TestFolder folder;
  std::vector<std::vector<std::byte>> bytes;
  std::vector<TensorData> data;
  for (const TensorInfo& tensor : file.tensors()) {
    bytes.emplace_back(tensor.bytes);
    file.Read(tensor, bytes.back());
    data.push_back({tensor.name, tensor.dtype, tensor.shape, bytes.back()});
  }
  WriteSafetensors(folder.path() / "copy.safetensors", data, file.metadata());
  EXPECT_EQ(ReadTextFile(folder.path() / "copy.safetensors"), stored);
}

TEST(SafetensorsWriter, EmptyFileAndNoMetadata) {
  const TestFolder folder;
  WriteSafetensors(folder.path() / "x.safetensors", {});
  EXPECT_EQ(ReadTextFile(folder.path() / "x.safetensors"),
            std::string("\x8\0\0\0\0\0\0\0{}      ", 16));
  EXPECT_TRUE(SafetensorsFile::Open(folder.path() / "x.safetensors").tensors().empty());
}

TEST(SafetensorsWriter, RefusesWhatTheReaderWouldRefuse) {
  const auto error = [](std::vector<TensorInfo> tensors) {
    return ModelErrorOf([&] { LayOutSafetensors(tensors, {}); });
  };
  const auto tensor = [](const std::string& name, std::vector<uint64_t> shape) {
    return TensorInfo{.name = name, .dtype = Dtype::kF32, .shape = std::move(shape)};
  };
  EXPECT_THAT(error({tensor("a", {}), tensor("a", {})}), HasSubstr("appears twice"));
  EXPECT_THAT(error({tensor("__metadata__", {})}), HasSubstr("reserved"));
  EXPECT_THAT(error({tensor("../a", {})}), HasSubstr(".."));
  EXPECT_THAT(error({tensor("a\xff", {})}), HasSubstr("UTF-8"));
  EXPECT_THAT(error({tensor("a", std::vector<uint64_t>(9, 1))}), HasSubstr("9 dimensions"));
  EXPECT_THAT(error({tensor("a", {1ull << 62, 4})}), HasSubstr("64 bits"));
  EXPECT_THAT(error({tensor("a", {1ull << 61}), tensor("b", {1ull << 61})}), HasSubstr("64 bits"));
}

TEST(SafetensorsWriter, LeavesNothingBehindWhenItFails) {
  const TestFolder folder;
  const std::array<std::byte, 3> data{};
  const std::vector<TensorData> wrong = {{"a", Dtype::kF32, {1}, data}};
  EXPECT_THROW(WriteSafetensors(folder.path() / "x.safetensors", wrong), RuntimeError);
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

}  // namespace
}  // namespace winnow
