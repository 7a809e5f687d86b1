// Writes safetensors files. The layout is fixed before the first byte of data, so that a file can
// be streamed, continued after a crash, and is the same bytes however it was written.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"               // File, fs
#include "checkpoint/tensor_info.h"  // TensorInfo

namespace winnow {

// Computes file offsets for `tensors` in the given order and returns the complete header (length
// included, padded to a multiple of 8). Only name, dtype and shape are read; bytes and file_offset
// are filled in.
std::string LayOutSafetensors(std::vector<TensorInfo>& tensors,
                              const std::map<std::string, std::string>& metadata);

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
