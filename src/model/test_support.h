// For tests: the golden checkpoints of tests/data/golden and small changes to copies of them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "base/file.h"                    // fs
#include "base/json.h"                    // OrderedJson
#include "checkpoint/safetensors_file.h"  // SafetensorsFile
#include "checkpoint/test_folder.h"       // TestFolder

namespace winnow {

inline fs::path GoldenFolder(const std::string& name) {
  return fs::path(WINNOW_TEST_DATA) / "golden" / name;
}

// The reference values of a golden checkpoint. Two of them hold the same weights.
inline SafetensorsFile GoldenValues(const std::string& name) {
  const std::string source = name.starts_with("mixtral-bf16-") ? "mixtral-bf16" : name;
  return SafetensorsFile::Open(fs::path(WINNOW_TEST_DATA) / "golden" / "expected" /
                               (source + ".safetensors"));
}

template <class T>
std::vector<T> ReadArray(const SafetensorsFile& file, const std::string& name) {
  const TensorInfo& tensor = file.Get(name);
  if (DtypeBits(tensor.dtype) != 8 * sizeof(T)) throw RuntimeError(name + " has another type");
  std::vector<T> values(static_cast<size_t>(tensor.bytes) / sizeof(T));
  file.Read(tensor, std::as_writable_bytes(std::span(values)));
  return values;
}

// Integers, which reference files hold in 32 or 64 bits.
inline std::vector<int32_t> ReadIntegers(const SafetensorsFile& file, const std::string& name) {
  if (file.Get(name).dtype == Dtype::kI32) return ReadArray<int32_t>(file, name);
  const std::vector<int64_t> wide = ReadArray<int64_t>(file, name);
  return {wide.begin(), wide.end()};
}

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Infinite if the sizes differ or a value is NaN, so that it fails every limit.
inline double MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return kInfinity;
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference < kInfinity)) return kInfinity;
    largest = std::max(largest, difference);
  }
  return largest;
}

// For INSTANTIATE_TEST_SUITE_P over names with dashes.
inline std::string TestName(const testing::TestParamInfo<const char*>& param) {
  std::string name = param.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

// The files of `source` under `target`, which is created.
inline fs::path CopyFolder(const fs::path& source, const fs::path& target) {
  fs::create_directories(target);
  for (const fs::directory_entry& entry : fs::directory_iterator(source)) {
    fs::copy_file(entry.path(), target / entry.path().filename());
  }
  return target;
}

inline OrderedJson ReadConfig(const fs::path& folder) {
  const fs::path path = folder / "config.json";
  return ParseOrderedJson(ReadTextFile(path), path.string());
}

inline void EditConfig(const fs::path& folder, const std::function<void(OrderedJson&)>& edit) {
  OrderedJson config = ReadConfig(folder);
  edit(config);
  WriteFileAtomically(folder / "config.json", config.dump(1));
}

// Name and content of every file, for comparing folders byte for byte.
inline std::map<std::string, std::string> FolderContent(const fs::path& folder) {
  std::map<std::string, std::string> content;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    content[entry.path().filename().string()] = ReadTextFile(entry.path());
  }
  return content;
}

// Equal folders, without printing megabytes when they are not.
inline void ExpectSameContent(const fs::path& a, const fs::path& b) {
  const std::map<std::string, std::string> left = FolderContent(a), right = FolderContent(b);
  for (const auto& [name, bytes] : left) {
    const auto it = right.find(name);
    ASSERT_TRUE(it != right.end()) << name << " is missing in " << b;
    EXPECT_TRUE(it->second == bytes) << name << " differs between " << a << " and " << b;
  }
  EXPECT_EQ(left.size(), right.size()) << b << " has more files than " << a;
}

}  // namespace winnow
