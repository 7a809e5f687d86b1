#include "checkpoint/safetensors_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "checkpoint/safetensors_header.h"

namespace winnow {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

SafetensorsFile SafetensorsFile::Open(const fs::path& path) {
  SafetensorsFile result(File::OpenRead(path));
  const std::string where = path.string();
  const uint64_t file_bytes = result.file_.size();
  std::array<std::byte, 8> prefix{};
  if (file_bytes >= prefix.size()) result.file_.ReadAt(0, prefix);
  if (std::memcmp(prefix.data(), "version ", prefix.size()) == 0) {
    throw ModelError(fmt::format("{}: a Git LFS pointer, not the file itself", where),
                     "run `git lfs pull` in that folder to fetch the weights");
  }
  const uint64_t length = std::bit_cast<uint64_t>(prefix);
  CheckSafetensorsLength(length, file_bytes, where);
  result.header_.resize(static_cast<size_t>(length));
  result.file_.ReadAt(prefix.size(), std::as_writable_bytes(std::span(result.header_)));
  SafetensorsHeader header = ParseSafetensorsHeader(result.header_, file_bytes, where);
  result.tensors_ = std::move(header.tensors);
  result.by_name_ = std::move(header.by_name);
  result.metadata_ = std::move(header.metadata);
  return result;
}

const TensorInfo* SafetensorsFile::Find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [&](uint32_t index, std::string_view key) { return tensors_[index].name < key; });
  if (found == by_name_.end() || tensors_[*found].name != name) return nullptr;
  return &tensors_[*found];
}

const TensorInfo& SafetensorsFile::Get(std::string_view name) const {
  const TensorInfo* tensor = Find(name);
  if (tensor == nullptr) {
    throw ModelError(fmt::format("{}: tensor {} is not in the file (it has {} tensors)",
                                 path().string(), QuotedName(name), tensors_.size()));
  }
  return *tensor;
}

void SafetensorsFile::Read(const TensorInfo& tensor, std::span<std::byte> out) const {
  if (out.size() != tensor.bytes) {
    throw RuntimeError(fmt::format("{}: tensor {}: read of {} bytes into a buffer of {}",
                                   path().string(), QuotedName(tensor.name), tensor.bytes,
                                   out.size()));
  }
  ReadPart(tensor, 0, out);
}

void SafetensorsFile::ReadPart(const TensorInfo& tensor, uint64_t offset,
                               std::span<std::byte> out) const {
  if (offset > tensor.bytes || out.size() > tensor.bytes - offset) {
    throw RuntimeError(fmt::format("{}: tensor {}: read of {} bytes at {} leaves its {} bytes",
                                   path().string(), QuotedName(tensor.name), out.size(), offset,
                                   tensor.bytes));
  }
  file_.ReadAt(tensor.file_offset + offset, out);
}

}  // namespace winnow
