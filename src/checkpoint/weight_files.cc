#include "checkpoint/weight_files.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <system_error>

#include "base/error.h"
#include "checkpoint/safetensors_header.h"

namespace winnow {
namespace {

constexpr char kSingleName[] = "model.safetensors";
constexpr char kSuffix[] = ".safetensors";
constexpr uint64_t kMaxIndexBytes = kMaxSafetensorsHeaderBytes;

bool Contains(const std::vector<std::string>& sorted, std::string_view name) {
  return std::binary_search(sorted.begin(), sorted.end(), name, std::less<>());
}

// "a, b, c and 7 more"
std::string Listed(const std::vector<std::string>& names) {
  constexpr size_t kShown = 3;
  const size_t shown = std::min(kShown, names.size());
  std::string text = fmt::format("{}", fmt::join(names.begin(), names.begin() + shown, ", "));
  if (shown < names.size()) text += fmt::format(" and {} more", names.size() - shown);
  return text;
}

struct ShardName {
  std::string stem;
  uint32_t number = 0;
  uint32_t total = 0;
};

// model-00002-of-00013.safetensors
std::optional<ShardName> ParseShardName(std::string_view name) {
  constexpr size_t kTail = 15;  // -00002-of-00013
  if (!name.ends_with(kSuffix)) return std::nullopt;
  name.remove_suffix(sizeof(kSuffix) - 1);
  if (name.size() <= kTail) return std::nullopt;
  const std::string_view tail = name.substr(name.size() - kTail);
  if (tail[0] != '-' || tail.substr(6, 4) != "-of-") return std::nullopt;
  const auto number = [](std::string_view digits) -> uint32_t {
    uint32_t value = 0;
    for (const char c : digits) {
      if (c < '0' || c > '9') return 0;
      value = value * 10 + static_cast<uint32_t>(c - '0');
    }
    return value;
  };
  ShardName shard{std::string(name.substr(0, name.size() - kTail)), number(tail.substr(1, 5)),
                  number(tail.substr(10, 5))};
  if (shard.number == 0 || shard.number > shard.total) return std::nullopt;
  return shard;
}

void ReportUnread(const std::vector<std::string>& candidates, const std::vector<std::string>& used,
                  std::vector<std::string>& findings) {
  std::vector<std::string> unread;
  std::set_difference(candidates.begin(), candidates.end(), used.begin(), used.end(),
                      std::back_inserter(unread));
  if (unread.empty()) return;
  findings.push_back(fmt::format("not read as weights: {} (no index names {})", Listed(unread),
                                 unread.size() == 1 ? "it" : "them"));
}

[[noreturn]] void ThrowMissingShards(const fs::path& folder,
                                     const std::vector<std::string>& missing,
                                     std::string_view claim) {
  std::string hint = "fetch the missing files; the download may have been interrupted";
  std::error_code ignored;
  if (fs::is_symlink(folder / missing.front(), ignored)) {
    hint = "it is a link whose target is missing; fetch the model again";
  }
  throw ModelError(fmt::format("{}: missing {} ({})", folder.string(), Listed(missing), claim),
                   hint);
}

// No index and no model.safetensors: numbered shards must be complete, other names are all taken.
std::vector<std::string> WithoutIndex(const fs::path& folder,
                                      const std::vector<std::string>& candidates,
                                      std::vector<std::string>& findings) {
  std::map<std::pair<std::string, uint32_t>, std::vector<std::string>> sets;
  for (const std::string& name : candidates) {
    if (const auto shard = ParseShardName(name)) sets[{shard->stem, shard->total}].push_back(name);
  }
  if (sets.empty()) {
    findings.push_back(fmt::format("no {} and no {}: {} taken as the weights", kShardIndexName,
                                   kSingleName, Listed(candidates)));
    return candidates;
  }
  auto chosen = sets.begin();
  if (sets.size() > 1) {
    chosen = std::find_if(sets.begin(), sets.end(), [](const auto& set) {
      return set.first.first == "model" && set.second.size() == set.first.second;
    });
    if (chosen == sets.end()) {
      throw ModelError(
          fmt::format("{}: no {}, and its shards belong to {} different sets ({})", folder.string(),
                      kShardIndexName, sets.size(), Listed(candidates)),
          "fetch the index or remove the shards that do not belong to the model");
    }
  }
  const auto& [stem, total] = chosen->first;
  std::vector<std::string> missing;
  for (uint32_t number = 1; number <= total; ++number) {
    std::string name = fmt::format("{}-{:05}-of-{:05}{}", stem, number, total, kSuffix);
    if (!Contains(chosen->second, name)) missing.push_back(std::move(name));
  }
  if (!missing.empty()) {
    ThrowMissingShards(folder, missing,
                       fmt::format("{} of {} shards are there", chosen->second.size(), total));
  }
  findings.push_back(fmt::format("no {}: the {} numbered shards are taken as the weights",
                                 kShardIndexName, total));
  ReportUnread(candidates, chosen->second, findings);
  return chosen->second;
}

[[noreturn]] void ThrowNoWeights(const fs::path& folder, const std::vector<std::string>& files) {
  std::error_code ignored;
  if (fs::is_symlink(folder / kSingleName, ignored)) {
    throw ModelError(
        fmt::format("{}: {} is a link whose target is missing", folder.string(), kSingleName),
        "fetch the model again; the download may have been interrupted");
  }
  const auto foreign = std::find_if(files.begin(), files.end(), IsWeightFileName);
  if (foreign != files.end()) {
    throw ModelError(fmt::format("{}: has {} but no .safetensors file; only safetensors are read",
                                 folder.string(), *foreign),
                     "fetch the model's safetensors, or convert it with transformers "
                     "(save_pretrained writes safetensors)");
  }
  throw ModelError(fmt::format("{}: no weights: expected {} or {} with its shards", folder.string(),
                               kSingleName, kShardIndexName),
                   "fetch the model's .safetensors files into that folder");
}

}  // namespace

std::vector<std::string> ListFiles(const fs::path& folder) {
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    throw ModelError(fmt::format("{}: {}", folder.string(),
                                 fs::exists(folder, error) ? "not a folder" : "no such folder"),
                     "give the folder that holds the model's config.json and .safetensors files");
  }
  std::vector<std::string> names;
  fs::directory_iterator entries(folder, error);
  for (; !error && entries != fs::directory_iterator(); entries.increment(error)) {
    std::string name = entries->path().filename().string();
    std::error_code broken;  // a dangling link or a loop is no file
    if (!name.starts_with('.') && entries->is_regular_file(broken))
      names.push_back(std::move(name));
  }
  if (error) {
    throw RuntimeError(fmt::format("cannot list {}: {}", folder.string(), error.message()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool IsWeightFileName(std::string_view name) {
  for (const std::string_view ending : {".safetensors", ".safetensors.index.json", ".gguf", ".pth",
                                        ".pt", ".h5", ".msgpack", ".onnx", ".ckpt"}) {
    if (name.ends_with(ending)) return true;
  }
  return name.starts_with("pytorch_model") &&
         (name.ends_with(".bin") || name.ends_with(".bin.index.json"));
}

WeightFiles FindWeightFiles(const fs::path& folder, const std::vector<std::string>& files,
                            std::vector<std::string>& findings) {
  std::vector<std::string> candidates;
  for (const std::string& name : files) {
    if (name.ends_with(kSuffix)) candidates.push_back(name);
  }
  const bool has_single = Contains(files, kSingleName);
  WeightFiles result;
  if (Contains(files, kShardIndexName)) {
    const fs::path path = folder / kShardIndexName;
    ShardIndex index = ParseShardIndex(ReadTextFile(path, kMaxIndexBytes), path.string());
    std::vector<std::string> missing;
    std::set_difference(index.files.begin(), index.files.end(), candidates.begin(),
                        candidates.end(), std::back_inserter(missing));
    if (missing.empty()) {
      result.names = index.files;
      result.index = std::move(index);
      ReportUnread(candidates, result.names, findings);
      return result;
    }
    if (!has_single || Contains(index.files, kSingleName)) {
      ThrowMissingShards(folder, missing,
                         fmt::format("{} names {} shards", kShardIndexName, index.files.size()));
    }
    findings.push_back(fmt::format("{} names {} missing file{} ({}); {} is read instead",
                                   kShardIndexName, missing.size(), missing.size() == 1 ? "" : "s",
                                   Listed(missing), kSingleName));
  }
  if (has_single) {
    result.names = {kSingleName};
    ReportUnread(candidates, result.names, findings);
  } else if (!candidates.empty()) {
    result.names = WithoutIndex(folder, candidates, findings);
  } else {
    ThrowNoWeights(folder, files);
  }
  return result;
}

}  // namespace winnow
