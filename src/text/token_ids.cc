#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "checkpoint/safetensors_file.h"
#include "text/text_source.h"

namespace winnow {
namespace {

constexpr char kIds[] = "input_ids";
constexpr char kOffsets[] = "offsets";
constexpr char kMask[] = "mask";
// Beyond these a token outweighs all others or vanishes.
constexpr float kLeastWeight = 1e-6f, kMostWeight = 1e6f;
constexpr char kHint[] = "expected input_ids I32 or I64 [n, T], or [N] with offsets [n + 1]";

// Calls body(position, value) for each integer, a buffer at a time.
template <class Body>
void ForEachInteger(const SafetensorsFile& file, const TensorInfo& tensor, Body body) {
  if (tensor.dtype != Dtype::kI32 && tensor.dtype != Dtype::kI64) {
    throw ModelError(fmt::format("{}: tensor {} is {}, expected I32 or I64", file.path().string(),
                                 tensor.name, tensor.Describe()),
                     kHint);
  }
  const size_t width = tensor.dtype == Dtype::kI32 ? 4 : 8;
  std::vector<std::byte> buffer(size_t{64} << 10);
  int64_t position = 0;
  for (uint64_t offset = 0; offset < tensor.bytes; offset += buffer.size()) {
    const auto part = std::span(buffer).first(
        static_cast<size_t>(std::min<uint64_t>(buffer.size(), tensor.bytes - offset)));
    file.ReadPart(tensor, offset, part);
    for (size_t i = 0; i < part.size(); i += width, ++position) {
      int32_t narrow = 0;
      int64_t wide = 0;
      if (width == 4) {
        std::memcpy(&narrow, part.data() + i, 4);
        wide = narrow;
      } else {
        std::memcpy(&wide, part.data() + i, 8);
      }
      body(position, wide);
    }
  }
}

// What each token counts for, e.g. 1 for those of answers and 0 for the rest.
std::vector<float> ReadMask(const SafetensorsFile& file, const TensorInfo& mask,
                            const TensorInfo& ids) {
  const std::string where = file.path().string();
  if (mask.shape != ids.shape) {
    throw ModelError(
        fmt::format("{}: {} is {}, {} is {}", where, kMask, mask.Describe(), kIds, ids.Describe()),
        "a mask has one number for each token id");
  }
  std::vector<float> weights;
  if (mask.dtype == Dtype::kF32) {
    weights.resize(static_cast<size_t>(mask.bytes / sizeof(float)));
    file.Read(mask, std::as_writable_bytes(std::span(weights)));
  } else if (mask.dtype == Dtype::kU8 || mask.dtype == Dtype::kBool) {
    std::vector<uint8_t> bytes(static_cast<size_t>(mask.bytes));
    file.Read(mask, std::as_writable_bytes(std::span(bytes)));
    weights.assign(bytes.begin(), bytes.end());
  } else {
    ForEachInteger(file, mask,
                   [&](int64_t, int64_t value) { weights.push_back(static_cast<float>(value)); });
  }
  double total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] == 0 || (weights[i] >= kLeastWeight && weights[i] <= kMostWeight))) {
      throw ModelError(
          fmt::format("{}: {}[{}] is {}, expected 0 or 1e-6 to 1e6", where, kMask, i, weights[i]),
          "a mask says what each token counts for, e.g. 1 for answers and 0 for prompts");
    }
    total += static_cast<double>(weights[i]);
  }
  if (!(total > 0)) {
    throw ModelError(fmt::format("{}: {} counts no token", where, kMask),
                     "leave it out if all tokens count alike");
  }
  return weights;
}

}  // namespace

TokenSequences ReadTokenIds(const fs::path& path) {
  const SafetensorsFile file = SafetensorsFile::Open(path);
  const std::string where = path.string();
  const TensorInfo* ids = file.Find(kIds);
  if (ids == nullptr) {
    throw ModelError(fmt::format("{}: no tensor {}", where, kIds), kHint);
  }
  const TensorInfo* offsets = file.Find(kOffsets);
  if (ids->shape.size() != (offsets == nullptr ? 2u : 1u)) {
    throw ModelError(fmt::format("{}: {} is {} {} offsets", where, kIds, ids->Describe(),
                                 offsets == nullptr ? "without" : "with"),
                     kHint);
  }
  const auto count = static_cast<int64_t>(ids->bytes * 8 / DtypeBits(ids->dtype));
  if (count == 0) throw ModelError(fmt::format("{}: {} is empty", where, kIds), kHint);

  TokenSequences result;
  result.ids.reserve(static_cast<size_t>(count));
  ForEachInteger(file, *ids, [&](int64_t position, int64_t id) {
    if (id < 0 || id > std::numeric_limits<int32_t>::max()) {
      throw ModelError(fmt::format("{}: {}[{}] is {}, no token id", where, kIds, position, id));
    }
    result.ids.push_back(static_cast<int32_t>(id));
  });
  if (const TensorInfo* mask = file.Find(kMask)) result.weights = ReadMask(file, *mask, *ids);
  if (offsets == nullptr) {
    const auto row = static_cast<int64_t>(ids->shape[1]);
    for (int64_t offset = 0; offset <= count; offset += row) result.offsets.push_back(offset);
    return result;
  }
  if (offsets->shape.size() != 1 || offsets->shape[0] < 2) {
    throw ModelError(
        fmt::format("{}: {} is {}, expected [n + 1]", where, kOffsets, offsets->Describe()), kHint);
  }
  ForEachInteger(file, *offsets, [&](int64_t position, int64_t offset) {
    const bool rises = position == 0 ? offset == 0 : offset > result.offsets.back();
    if (!rises || offset > count) {
      throw ModelError(
          fmt::format("{}: {}[{}] is {}, expected a rise from 0 to {} without empty rows", where,
                      kOffsets, position, offset, count));
    }
    result.offsets.push_back(offset);
  });
  if (result.offsets.back() != count) {
    throw ModelError(fmt::format("{}: {} ends at {}, {} has {} ids", where, kOffsets,
                                 result.offsets.back(), kIds, count));
  }
  return result;
}

}  // namespace winnow
