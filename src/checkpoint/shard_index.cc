#include "checkpoint/shard_index.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>

#include "base/error.h"
#include "base/json.h"
#include "checkpoint/safetensors_header.h"

namespace winnow {
namespace {

constexpr char kDamagedHint[] = "the file is damaged or was cut off; fetch or write it again";

// Each open shard costs a file descriptor; the largest published checkpoints have under 200.
constexpr size_t kMaxShards = 10'000;
constexpr size_t kMaxFileNameBytes = 255;

std::string FileNameProblem(std::string_view name) {
  if (const std::string problem = TensorNameProblem(name); !problem.empty()) return problem;
  if (name.size() > kMaxFileNameBytes) {
    return fmt::format("is longer than {} bytes", kMaxFileNameBytes);
  }
  if (name.find('/') != std::string_view::npos) return "has a path separator";
  if (name.front() == '.') return "is hidden";
  if (!name.ends_with(".safetensors")) return "is no .safetensors file";
  return {};
}

// Keeps the tensor names and one copy of each file name, so that memory stays near the file's size;
// members other than weight_map and metadata.total_size are skipped.
class IndexReader : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return Value("null"); }
  bool boolean(bool) override { return Value("a boolean"); }
  bool number_integer(number_integer_t value) override {
    return Number(static_cast<double>(value));
  }
  bool number_unsigned(number_unsigned_t value) override {
    return Number(static_cast<double>(value));
  }
  bool number_float(number_float_t value, const string_t&) override { return Number(value); }
  bool binary(binary_t&) override { return Value("binary data"); }

  bool string(string_t& value) override {
    if (!(depth_ == 2 && section_ == Section::kWeightMap)) return Value("a string");
    const auto known = file_numbers_.find(value);
    if (known != file_numbers_.end()) {
      index_.weight_map.back().second = known->second;
      return true;
    }
    if (const std::string problem = FileNameProblem(value); !problem.empty()) {
      hint_ = "an index may only name .safetensors files that lie beside it";
      return Fail(fmt::format("tensor {} is mapped to {}, which {}",
                              QuotedName(index_.weight_map.back().first), QuotedName(value),
                              problem));
    }
    if (index_.files.size() == kMaxShards) {
      return Fail(fmt::format("names more than {} files", kMaxShards));
    }
    const auto number = static_cast<uint32_t>(index_.files.size());
    file_numbers_.emplace(value, number);
    index_.files.push_back(value);
    index_.weight_map.back().second = number;
    return true;
  }

  bool key(string_t& name) override {
    if (depth_ == 1) {
      key_ = name;
      section_ = name == "weight_map" ? Section::kWeightMap
                 : name == "metadata" ? Section::kMetadata
                                      : Section::kOther;
      bool ignored = false;
      bool& seen = section_ == Section::kWeightMap  ? has_weight_map_
                   : section_ == Section::kMetadata ? has_metadata_
                                                    : ignored;
      if (std::exchange(seen, true)) return Fail(fmt::format("{} appears twice", name));
    } else if (depth_ == 2 && section_ == Section::kWeightMap) {
      if (const std::string problem = TensorNameProblem(name); !problem.empty()) {
        return Fail(fmt::format("tensor name {} {}", QuotedName(name), problem));
      }
      if (index_.weight_map.size() == kMaxTensorCount) {
        return Fail(fmt::format("weight_map names more than {} tensors", kMaxTensorCount));
      }
      index_.weight_map.emplace_back(name, 0);
    } else if (depth_ == 2 && section_ == Section::kMetadata) {
      key_ = name;
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (depth_ == 1 && section_ == Section::kWeightMap) {
      ++depth_;
      return true;
    }
    return (depth_ == 0 || Value("an object")) && Enter();
  }
  bool start_array(std::size_t) override { return Value("an array") && Enter(); }
  bool end_object() override {
    --depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& e) override {
    std::string what = e.what();
    if (const size_t start = what.find("syntax error"); start != std::string::npos) {
      what = what.substr(start);
    }
    hint_ = kDamagedHint;
    return Fail(fmt::format("not valid JSON at byte {}: {}", position, QuotedName(what)));
  }

  bool has_weight_map() const { return has_weight_map_; }
  const std::string& problem() const { return problem_; }
  const std::string& hint() const { return hint_; }
  ShardIndex& index() { return index_; }

 private:
  enum class Section { kNone, kWeightMap, kMetadata, kOther };

  // Any value that is not a file name in weight_map.
  bool Value(std::string_view got) {
    if (depth_ == 0) return Fail(fmt::format("is {}, expected an object", got));
    if (section_ != Section::kWeightMap) return true;
    if (depth_ == 1) return Fail(fmt::format("weight_map is {}, expected an object", got));
    return Fail(fmt::format("tensor {} is mapped to {}, expected a file name",
                            QuotedName(index_.weight_map.back().first), got));
  }

  bool Number(double value) {
    if (depth_ == 2 && section_ == Section::kMetadata && key_ == "total_size") {
      index_.total_size = value;
    }
    return Value("a number");
  }

  bool Enter() {
    if (++depth_ <= kMaxJsonDepth) return true;
    return Fail(fmt::format("nested deeper than {} levels", kMaxJsonDepth));
  }

  bool Fail(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  ShardIndex index_;
  std::unordered_map<std::string, uint32_t> file_numbers_;
  std::string key_;
  std::string problem_;
  std::string hint_;
  Section section_ = Section::kNone;
  int depth_ = 0;
  bool has_weight_map_ = false;
  bool has_metadata_ = false;
};

void SortFiles(ShardIndex& index) {
  std::vector<std::string> sorted = index.files;
  std::sort(sorted.begin(), sorted.end());
  std::vector<uint32_t> number(sorted.size());  // old number -> new number
  for (size_t i = 0; i < sorted.size(); ++i) {
    const auto found = std::lower_bound(sorted.begin(), sorted.end(), index.files[i]);
    number[i] = static_cast<uint32_t>(found - sorted.begin());
  }
  for (auto& [tensor, file] : index.weight_map) file = number[file];
  index.files = std::move(sorted);
}

}  // namespace

ShardIndex ParseShardIndex(std::string_view text, const std::string& where) {
  // The JSON parser takes a zero byte for the end of its input.
  if (const size_t zero = text.find('\0'); zero != std::string_view::npos) {
    throw ModelError(fmt::format("{}: zero byte at byte {}", where, zero), kDamagedHint);
  }
  IndexReader reader;
  if (!Json::sax_parse(text.data(), text.data() + text.size(), &reader)) {
    throw ModelError(fmt::format("{}: {}", where, reader.problem()), reader.hint());
  }
  if (!reader.has_weight_map()) throw ModelError(fmt::format("{}: no weight_map", where));
  ShardIndex index = std::move(reader.index());
  if (index.weight_map.empty()) throw ModelError(fmt::format("{}: weight_map is empty", where));
  SortFiles(index);
  std::sort(index.weight_map.begin(), index.weight_map.end());
  const auto duplicate =
      std::adjacent_find(index.weight_map.begin(), index.weight_map.end(),
                         [](const auto& a, const auto& b) { return a.first == b.first; });
  if (duplicate != index.weight_map.end()) {
    throw ModelError(
        fmt::format("{}: tensor {} appears twice", where, QuotedName(duplicate->first)));
  }
  return index;
}

}  // namespace winnow
