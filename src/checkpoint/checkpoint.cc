#include "checkpoint/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/hash.h"
#include "base/units.h"
#include "checkpoint/safetensors_header.h"
#include "checkpoint/weight_files.h"

namespace winnow {
namespace {

constexpr char kConfigName[] = "config.json";

// OrderedJson looks keys up one by one; these keep a hostile config from taking minutes. Real ones
// have a few hundred keys and, with quantisation lists, some 100 KiB.
constexpr uint64_t kMaxConfigBytes = uint64_t{4} << 20;
constexpr size_t kMaxConfigKeys = 10'000;

void CheckObjectSizes(const Json& value,
                      const std::string& where) {  // depth is bounded by ParseJson
  if (value.is_object() && value.size() > kMaxConfigKeys) {
    throw ModelError(fmt::format("{}: an object of {} keys, the limit is {}", where, value.size(),
                                 kMaxConfigKeys));
  }
  if (value.is_structured()) {
    for (const Json& child : value) CheckObjectSizes(child, where);
  }
}

OrderedJson ReadConfig(const fs::path& folder, const std::vector<std::string>& files) {
  const fs::path path = folder / kConfigName;
  if (!std::binary_search(files.begin(), files.end(), kConfigName)) {
    std::error_code ignored;
    throw ModelError(
        fmt::format("{}: no {}", folder.string(), kConfigName),
        fs::is_directory(folder / "snapshots", ignored)
            ? "this is a Hub cache folder; give one of its snapshots/<revision> folders"
            : "give the folder that holds the model's config.json and .safetensors files");
  }
  const std::string text = ReadTextFile(path, kMaxConfigBytes);
  CheckObjectSizes(ParseJson(text, path.string()), path.string());
  OrderedJson config = ParseOrderedJson(text, path.string());
  if (!config.is_object()) {
    throw ModelError(
        fmt::format("{}: expected an object, got {}", path.string(), config.type_name()));
  }
  return config;
}

// Every mapped tensor must be in the shard the index names; tensors the index leaves out and a
// wrong total are reported.
void CheckIndex(const ShardIndex& index, const Checkpoint& checkpoint,
                std::vector<std::string>& findings) {
  const std::string where = (checkpoint.folder() / kShardIndexName).string();
  for (const auto& [name, shard] : index.weight_map) {
    const TensorInfo* tensor = checkpoint.Find(name);
    if (tensor != nullptr && static_cast<uint32_t>(tensor->shard) == shard) continue;
    throw ModelError(
        fmt::format("{}: tensor {} is mapped to {}, which does not hold it ({})", where,
                    QuotedName(name), index.files[shard],
                    tensor == nullptr
                        ? "no shard does"
                        : fmt::format("{} does", index.files[static_cast<size_t>(tensor->shard)])),
        "the index and the shards belong to different versions; fetch them again");
  }
  if (const size_t extra = checkpoint.tensors().size() - index.weight_map.size(); extra > 0) {
    const auto unnamed = std::find_if(
        checkpoint.tensors().begin(), checkpoint.tensors().end(), [&](const TensorInfo& tensor) {
          const auto found = std::lower_bound(
              index.weight_map.begin(), index.weight_map.end(), tensor.name,
              [](const auto& entry, const std::string& name) { return entry.first < name; });
          return found == index.weight_map.end() || found->first != tensor.name;
        });
    findings.push_back(fmt::format("{} tensor{} of the shards {} not in the index ({}{})", extra,
                                   extra == 1 ? "" : "s", extra == 1 ? "is" : "are",
                                   QuotedName(unnamed->name), extra == 1 ? "" : ", ..."));
  }
  const uint64_t total = checkpoint.total_bytes();
  if (index.total_size && *index.total_size != static_cast<double>(total)) {
    findings.push_back(
        fmt::format("the index gives a total_size of {:.0f} bytes, the tensors have {}",
                    *index.total_size, total));
  }
}

// 64 KiB of the shard's data in 16 evenly spaced pieces: replaced weights change all of it.
void AddSample(const SafetensorsFile& shard, Fingerprint& fingerprint) {
  constexpr uint64_t kPieces = 16;
  constexpr uint64_t kPieceBytes = 4096;
  const uint64_t file_bytes = shard.file().size();
  const uint64_t start = 8 + shard.header().size();
  const uint64_t data_bytes = file_bytes - std::min(file_bytes, start);
  std::vector<std::byte> buffer(kPieces * kPieceBytes);
  if (data_bytes <= buffer.size()) {
    buffer.resize(static_cast<size_t>(data_bytes));
    shard.file().ReadAt(start, buffer);
  } else {
    const uint64_t step = (data_bytes - kPieceBytes) / (kPieces - 1);
    for (uint64_t i = 0; i < kPieces; ++i) {
      shard.file().ReadAt(start + i * step,
                          std::span(buffer).subspan(i * kPieceBytes, kPieceBytes));
    }
  }
  fingerprint.Add(file_bytes);
  fingerprint.Add(std::span<const std::byte>(buffer));
}

}  // namespace

Checkpoint Checkpoint::Open(const fs::path& folder) {
  const std::vector<std::string> files = ListFiles(folder);
  Checkpoint result;
  result.folder_ = folder;
  result.config_ = ReadConfig(folder, files);
  const WeightFiles weights = FindWeightFiles(folder, files, result.findings_);
  result.has_index_ = weights.index.has_value();

  size_t count = 0;
  for (const std::string& name : weights.names) {
    result.shards_.push_back(SafetensorsFile::Open(folder / name));
    count += result.shards_.back().tensors().size();
  }
  if (count > kMaxTensorCount) {
    throw ModelError(
        fmt::format("{}: {} tensors, the limit is {}", folder.string(), count, kMaxTensorCount));
  }
  result.tensors_.reserve(count);
  result.by_name_.reserve(count);
  for (size_t shard = 0; shard < result.shards_.size(); ++shard) {
    for (TensorInfo tensor : result.shards_[shard].tensors()) {
      const auto [position, is_new] =
          result.by_name_.emplace(tensor.name, static_cast<uint32_t>(result.tensors_.size()));
      if (!is_new) {
        const auto other = static_cast<size_t>(result.tensors_[position->second].shard);
        throw ModelError(
            fmt::format("{}: tensor {} is in two shards, {} and {}", folder.string(),
                        QuotedName(tensor.name), weights.names[other], weights.names[shard]),
            "remove the shard that does not belong to the model");
      }
      tensor.shard = static_cast<int32_t>(shard);
      result.total_bytes_ += tensor.bytes;  // no more than the files' sizes
      result.tensors_.push_back(std::move(tensor));
    }
  }
  if (weights.index) CheckIndex(*weights.index, result, result.findings_);
  return result;
}

const TensorInfo* Checkpoint::Find(std::string_view name) const {
  const auto found = by_name_.find(std::string(name));
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

std::vector<fs::path> Checkpoint::OtherFiles() const {
  std::vector<fs::path> others;
  std::error_code error;
  fs::recursive_directory_iterator entries(folder_, error);
  for (; !error && entries != fs::recursive_directory_iterator(); entries.increment(error)) {
    const std::string name = entries->path().filename().string();
    const bool ours = name.ends_with(".partial") || name.ends_with(".tmp");
    std::error_code broken;  // a dangling link is no file
    if (entries->is_directory(broken)) {
      // What version control and download tools keep for themselves.
      if (ours || name == ".git" || name == ".cache") entries.disable_recursion_pending();
      continue;
    }
    if (ours || IsWeightFileName(name) || !entries->is_regular_file(broken)) continue;
    fs::path relative = entries->path().lexically_relative(folder_);
    if (relative != kConfigName) others.push_back(std::move(relative));
  }
  if (error) {
    throw RuntimeError(fmt::format("cannot list {}: {}", folder_.string(), error.message()));
  }
  std::sort(others.begin(), others.end());
  return others;
}

void Checkpoint::Read(const TensorInfo& tensor, std::span<std::byte> out) const {
  shards_.at(static_cast<size_t>(tensor.shard)).Read(tensor, out);
}

void Checkpoint::ReadPart(const TensorInfo& tensor, uint64_t offset,
                          std::span<std::byte> out) const {
  shards_.at(static_cast<size_t>(tensor.shard)).ReadPart(tensor, offset, out);
}

std::string Checkpoint::FingerprintHex() const {
  Fingerprint fingerprint;
  fingerprint.Add(config_.dump());
  for (const SafetensorsFile& shard : shards_) {
    fingerprint.Add(shard.header());
    AddSample(shard, fingerprint);
  }
  return fingerprint.Hex();
}

}  // namespace winnow
