// A safetensors file: validated header, tensors read by position.
//
//   u64 little-endian N | N bytes of JSON, padded with spaces | data, offsets relative to its start
//
// Open() checks everything before anything is allocated for data: length, UTF-8, duplicate names,
// known dtypes, overflow-checked sizes, no holes, no overlaps, no trailing bytes, plain tensor
// names. Throws ModelError naming the file and tensor. Immutable and thread-safe once open.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"               // File, fs
#include "checkpoint/tensor_info.h"  // TensorInfo

namespace winnow {

class SafetensorsFile {
 public:
  static SafetensorsFile Open(const fs::path& path);

  const fs::path& path() const { return file_.path(); }
  const File& file() const { return file_; }
  // In file order.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // The header bytes as stored (without the length), for fingerprints.
  const std::string& header() const { return header_; }
  const TensorInfo* Find(std::string_view name) const;
  // ModelError if absent.
  const TensorInfo& Get(std::string_view name) const;
  // `out` must have exactly the tensor's size (or the given part's).
  void Read(const TensorInfo& tensor, std::span<std::byte> out) const;
  void ReadPart(const TensorInfo& tensor, uint64_t offset, std::span<std::byte> out) const;

 private:
  explicit SafetensorsFile(File file) : file_(std::move(file)) {}
  File file_;
  std::string header_;
  std::vector<TensorInfo> tensors_;
  std::vector<uint32_t> by_name_;  // indices into tensors_, sorted by name
  std::map<std::string, std::string> metadata_;
};

}  // namespace winnow
