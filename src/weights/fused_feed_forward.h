// One dense SwiGLU out of parts of a layer (methods: CD-MoE, neuron selection): rows of gate and up
// one below the other, columns of down side by side, each times its part's fixed weight. An
// identity, because silu(gate) * up acts neuron by neuron.
#pragma once

#include <cstdint>
#include <span>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/dtype.h"             // Dtype
#include "model/fused_part.h"       // FusedPart
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

struct FusedFeedForward {
  AlignedBuffer<std::byte> storage;
  FeedForwardWeights weights;  // into storage
};

// In `dtype` (F32, F16 or BF16), rounded to nearest. Neurons of zeros, which do nothing, fill up to
// `padded_width`.
FusedFeedForward FuseParts(const LayerWeights& layer, std::span<const FusedPart> parts, Dtype dtype,
                           int64_t padded_width = 0);
// The layer with the parts as its only SwiGLU, in the experts' format, no router and no experts:
// views of the layer's and of `fused`. The shared expert stays beside it unless it is one of the
// parts. Without parts it is all there is.
LayerWeights FusedLayer(const LayerWeights& layer, std::span<const FusedPart> parts,
                        FusedFeedForward& fused);
// Width of the result, and its bytes.
int64_t FusedWidth(std::span<const FusedPart> parts, int64_t expert_width, int64_t shared_width);
uint64_t FusedBytes(int64_t hidden, int64_t width, Dtype dtype);

}  // namespace winnow
