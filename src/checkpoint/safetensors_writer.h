// Writes safetensors files. The layout is fixed before the first byte of data, so that a file can
// be streamed, continued after a crash, and is the same bytes however it was written.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"               // File, fs
#include "checkpoint/tensor_info.h"  // TensorInfo

namespace winnow {

// Computes file offsets for `tensors` in the given order and returns the complete header (length
// included, padded to a multiple of 8). Only name, dtype and shape are read; bytes and file_offset
// are filled in. `like_offset`: the header is padded so that data start at the same place of a page
// as this offset (if it is a multiple of 8), for files that are copied in large part: the kernel
// copies whole pages about twice as fast as parts of two.
inline constexpr uint64_t kPageBytes = 4096;
std::string LayOutSafetensors(std::vector<TensorInfo>& tensors,
                              const std::map<std::string, std::string>& metadata,
                              std::optional<uint64_t> like_offset = {});

// One tensor to write whole, for small files (statistics, traces). `data` must match dtype x shape.
struct TensorData {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<uint64_t> shape;
  std::span<const std::byte> data;
};

// Writes beside `path`, syncs, renames.
void WriteSafetensors(const fs::path& path, std::span<const TensorData> tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace winnow
