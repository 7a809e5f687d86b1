#include "checkpoint/safetensors_writer.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <bit>
#include <cstring>
#include <system_error>
#include <unordered_set>

#include "base/checked_math.h"
#include "base/error.h"
#include "base/json.h"
#include "checkpoint/safetensors_header.h"

namespace winnow {
namespace {

constexpr char kWriting[] = "safetensors header";

std::string JsonString(const std::string& text) {
  try {
    return Json(text).dump();
  } catch (const Json::exception&) {
    throw ModelError(fmt::format("{}: {} is not valid UTF-8", kWriting, QuotedName(text)));
  }
}

// Refuses what the reader would refuse, so that no file is written that cannot be opened again.
void CheckTensors(const std::vector<TensorInfo>& tensors) {
  std::unordered_set<std::string_view> names;
  names.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) {
    std::string problem = TensorNameProblem(tensor.name);
    if (tensor.name == "__metadata__") problem = "is reserved";
    if (!names.insert(tensor.name).second) problem = "appears twice";
    if (tensor.shape.size() > kMaxTensorRank) {
      problem =
          fmt::format("has {} dimensions, the limit is {}", tensor.shape.size(), kMaxTensorRank);
    }
    if (!problem.empty()) {
      throw ModelError(fmt::format("{}: tensor {} {}", kWriting, QuotedName(tensor.name), problem));
    }
  }
}

}  // namespace

std::string LayOutSafetensors(std::vector<TensorInfo>& tensors,
                              const std::map<std::string, std::string>& metadata,
                              std::optional<uint64_t> like_offset) {
  CheckTensors(tensors);
  std::string header(8, '\0');
  header += '{';
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      if (header.back() != '{') header += ',';
      header += JsonString(key) + ':' + JsonString(value);
    }
    header += '}';
  }
  uint64_t end = 0;
  for (TensorInfo& tensor : tensors) {
    const uint64_t begin = end;
    tensor.bytes = TensorBytes(tensor, kWriting);
    end = CheckedAdd(begin, tensor.bytes, kWriting);
    if (header.size() > 9) header += ',';
    header += fmt::format("{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                          JsonString(tensor.name), DtypeName(tensor.dtype),
                          fmt::join(tensor.shape, ","), begin, end);
    tensor.file_offset = begin;
  }
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (like_offset && *like_offset % 8 == 0) {
    header.append((*like_offset + kPageBytes - header.size() % kPageBytes) % kPageBytes, ' ');
  }
  const uint64_t length = header.size() - 8;
  if (length > kMaxSafetensorsHeaderBytes) {
    throw ModelError(fmt::format("{}: {} bytes for {} tensors, the format's limit is {}", kWriting,
                                 length, tensors.size(), kMaxSafetensorsHeaderBytes),
                     "write the tensors in more than one file");
  }
  std::memcpy(header.data(), &length, sizeof(length));
  CheckedAdd(end, header.size(), kWriting);
  for (TensorInfo& tensor : tensors) tensor.file_offset += header.size();
  return header;
}

void WriteSafetensors(const fs::path& path, std::span<const TensorData> tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<TensorInfo> layout(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    layout[i].name = tensors[i].name;
    layout[i].dtype = tensors[i].dtype;
    layout[i].shape = tensors[i].shape;
  }
  const std::string header = LayOutSafetensors(layout, metadata);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].data.size() != layout[i].bytes) {
      throw RuntimeError(fmt::format("{}: tensor {}: {} needs {} bytes, got {}", path.string(),
                                     QuotedName(layout[i].name), layout[i].Describe(),
                                     layout[i].bytes, tensors[i].data.size()));
    }
  }
  const fs::path temporary = path.string() + ".tmp";
  try {
    {
      const File file = File::Create(temporary);
      file.WriteAt(0, std::as_bytes(std::span(header)));
      for (size_t i = 0; i < tensors.size(); ++i) {
        file.WriteAt(layout[i].file_offset, tensors[i].data);
      }
      file.Sync();
    }
    RenameDurably(temporary, path);
  } catch (...) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    throw;
  }
}

}  // namespace winnow
