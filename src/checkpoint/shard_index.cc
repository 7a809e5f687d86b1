#include "checkpoint/shard_index.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "checkpoint/safetensors_header.h"

namespace winnow {
namespace {

// Each open shard costs a file descriptor; the largest published checkpoints have under 200.
constexpr size_t kMaxShards = 10'000;

std::string FileNameProblem(std::string_view name) {
  if (const std::string problem = TensorNameProblem(name); !problem.empty()) return problem;
  if (name.size() > 255) return "is longer than 255 bytes";
  if (name.find('/') != std::string_view::npos) return "has a path separator";
  if (name == "." || name.front() == '.') return "is hidden";
  if (!name.ends_with(".safetensors")) return "is no .safetensors file";
  return {};
}

}  // namespace

ShardIndex ParseShardIndex(std::string_view text, const std::string& where) {
  const Json json = ParseJson(text, where);
  if (!json.is_object()) {
    throw ModelError(fmt::format("{}: expected an object, got {}", where, json.type_name()));
  }
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object()) {
    throw ModelError(fmt::format("{}: weight_map is {}, expected an object of file names", where,
                                 map == json.end() ? "missing" : map->type_name()));
  }
  if (map->empty()) throw ModelError(fmt::format("{}: weight_map is empty", where));
  if (map->size() > kMaxTensorCount) {
    throw ModelError(fmt::format("{}: weight_map names {} tensors, the limit is {}", where, map->size(),
                                 kMaxTensorCount));
  }
  ShardIndex index;
  std::map<std::string_view, uint32_t> files;  // sorted, as `files` will be
  for (const auto& [tensor, file] : map->items()) {
    if (const std::string problem = TensorNameProblem(tensor); !problem.empty()) {
      throw ModelError(fmt::format("{}: tensor name {} {}", where, QuotedName(tensor), problem));
    }
    if (!file.is_string()) {
      throw ModelError(fmt::format("{}: tensor {} is mapped to a {}, expected a file name", where,
                                   QuotedName(tensor), file.type_name()));
    }
    const std::string& name = file.get_ref<const std::string&>();
    if (!files.emplace(name, 0).second) continue;
    if (const std::string problem = FileNameProblem(name); !problem.empty()) {
      throw ModelError(fmt::format("{}: tensor {} is mapped to {}, which {}", where, QuotedName(tensor),
                                   QuotedName(name), problem),
                       "an index may only name files that lie beside it");
    }
    if (files.size() > kMaxShards) {
      throw ModelError(fmt::format("{}: names more than {} files", where, kMaxShards));
    }
  }
  for (auto& [name, number] : files) {
    number = static_cast<uint32_t>(index.files.size());
    index.files.emplace_back(name);
  }
  index.weight_map.reserve(map->size());
  for (const auto& [tensor, file] : map->items()) {
    index.weight_map.emplace_back(tensor, files.at(file.get_ref<const std::string&>()));
  }
  if (const auto metadata = json.find("metadata"); metadata != json.end() && metadata->is_object()) {
    const auto total = metadata->find("total_size");
    if (total != metadata->end() && total->is_number()) index.total_size = total->get<double>();
  }
  return index;
}

}  // namespace winnow
