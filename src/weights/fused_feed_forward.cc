#include "weights/fused_feed_forward.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/checked_math.h"
#include "base/error.h"

namespace winnow {
namespace {

const FeedForwardWeights& Source(const LayerWeights& layer, const FusedPart& part) {
  return part.expert == FusedPart::kShared ? layer.shared
                                           : layer.experts.at(static_cast<size_t>(part.expert));
}

std::vector<int32_t> NeuronsOf(const FusedPart& part, int64_t width) {
  if (!part.neurons.empty()) return part.neurons;
  std::vector<int32_t> all(static_cast<size_t>(width));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

}  // namespace

int64_t FusedWidth(std::span<const FusedPart> parts, int64_t expert_width, int64_t shared_width) {
  int64_t width = 0;
  for (const FusedPart& part : parts) {
    if (!part.neurons.empty()) {
      width += std::ssize(part.neurons);
    } else {
      width += part.expert == FusedPart::kShared ? shared_width : expert_width;
    }
  }
  return width;
}

uint64_t FusedBytes(int64_t hidden, int64_t width, Dtype dtype) {
  return CheckedMul(static_cast<uint64_t>(hidden) * 3,
                    static_cast<uint64_t>(width) * (DtypeBits(dtype) / 8), "a condensed layer");
}

LayerWeights FusedLayer(const LayerWeights& layer, std::span<const FusedPart> parts,
                        FusedFeedForward& fused) {
  LayerWeights result = layer.Condensed({}, {});
  if (parts.empty()) return result;
  fused = FuseParts(layer, parts, layer.experts.front().gate.dtype);
  result.dense = fused.weights;
  for (const FusedPart& part : parts) {
    if (part.expert == FusedPart::kShared) result.shared = {};
  }
  return result;
}

FusedFeedForward FuseParts(const LayerWeights& layer, std::span<const FusedPart> parts, Dtype dtype,
                           int64_t padded_width) {
  int64_t width = 0, hidden = 0;
  for (const FusedPart& part : parts) {
    const FeedForwardWeights& source = Source(layer, part);
    if (!source.gate.packed.empty() || !source.down.packed.empty()) {
      throw UsageError("packed experts cannot be fused", "condense first, quantise last");
    }
    width += part.neurons.empty() ? source.width() : std::ssize(part.neurons);
    hidden = source.gate.cols;
  }
  const bool padded = padded_width > width;
  width = std::max(width, padded_width);
  FusedFeedForward fused;
  fused.storage = AlignedBuffer<std::byte>(static_cast<size_t>(FusedBytes(hidden, width, dtype)));
  if (padded) std::memset(fused.storage.data(), 0, fused.storage.size());
  const size_t matrix_bytes = fused.storage.size() / 3;
  std::byte* const gate = fused.storage.data();
  std::byte* const up = gate + matrix_bytes;
  std::byte* const down = up + matrix_bytes;
  const auto h = static_cast<size_t>(hidden), w = static_cast<size_t>(width);
  size_t column = 0;
  for (const FusedPart& part : parts) {
    const FeedForwardWeights& source = Source(layer, part);
    const auto source_width = static_cast<size_t>(source.width());
    for (const int32_t neuron : NeuronsOf(part, source.width())) {
      const auto from = static_cast<size_t>(neuron);
      for (size_t i = 0; i < h; ++i) {
        StoreFloat(dtype, LoadAsFloat(source.gate.dtype, source.gate.data, from * h + i), gate,
                   column * h + i);
        StoreFloat(dtype, LoadAsFloat(source.up.dtype, source.up.data, from * h + i), up,
                   column * h + i);
        const auto value = static_cast<double>(
            LoadAsFloat(source.down.dtype, source.down.data, i * source_width + from));
        StoreFloat(dtype, static_cast<float>(part.alpha * value), down, i * w + column);
      }
      ++column;
    }
  }
  fused.weights.gate = {gate, width, hidden, dtype};
  fused.weights.up = {up, width, hidden, dtype};
  fused.weights.down = {down, hidden, width, dtype};
  return fused;
}

}  // namespace winnow
