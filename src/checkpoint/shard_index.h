// model.safetensors.index.json: which shard holds which tensor. Throws ModelError for anything but
// an object of strings that are plain file names inside the folder.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace winnow {

inline constexpr char kShardIndexName[] = "model.safetensors.index.json";

struct ShardIndex {
  std::vector<std::string> files;  // sorted, without repeats
  // Tensor name and index into `files`, sorted by name.
  std::vector<std::pair<std::string, uint32_t>> weight_map;
  // metadata.total_size; some writers store a float. Informative only.
  std::optional<double> total_size;
};

ShardIndex ParseShardIndex(std::string_view text, const std::string& where);

}  // namespace winnow
