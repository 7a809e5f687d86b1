// A Hugging Face checkpoint folder: its shards, its index and its config.json, as bytes without
// meaning (model/ gives them meaning). Folders as people have them: Hub cache snapshots made of
// symbolic links, shards the index does not name (a finding, not an error), one file or many.
// Refuses path traversal in the index, missing shards, tensors the index maps to a file that does
// not hold them, and tensors that are in two shards. Immutable and thread-safe once open.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"                    // OrderedJson
#include "checkpoint/safetensors_file.h"  // SafetensorsFile

namespace winnow {

class Checkpoint {
 public:
  static Checkpoint Open(const fs::path& folder);

  const fs::path& folder() const { return folder_; }
  const OrderedJson& config() const { return config_; }
  const std::vector<SafetensorsFile>& shards() const { return shards_; }
  bool has_index() const { return has_index_; }
  // All tensors of all shards in shard and file order.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* Find(std::string_view name) const;
  uint64_t total_bytes() const { return total_bytes_; }
  // Harmless oddities: unnamed shards, tensors missing from the index, ... one sentence each.
  const std::vector<std::string>& findings() const { return findings_; }
  // Every other regular file in the folder and below it (tokenizer, generation_config.json, *.py,
  // ...), relative to it: what a rewritten checkpoint carries through. Weights of other formats,
  // dangling links, unfinished outputs, .git and .cache are left out.
  std::vector<fs::path> OtherFiles() const;

  void Read(const TensorInfo& tensor, std::span<std::byte> out) const;
  void ReadPart(const TensorInfo& tensor, uint64_t offset, std::span<std::byte> out) const;

  // Depends on config.json, every shard's header and size, and 64 KiB sampled from each shard's
  // data, so it costs no full read.
  std::string FingerprintHex() const;

 private:
  Checkpoint() = default;
  fs::path folder_;
  OrderedJson config_;
  std::vector<SafetensorsFile> shards_;
  bool has_index_ = false;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, uint32_t> by_name_;
  uint64_t total_bytes_ = 0;
  std::vector<std::string> findings_;
};

}  // namespace winnow
