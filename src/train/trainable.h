// Which tensors of a model are trained. A parameter is a matrix or vector of one layer (or the
// final norm), possibly a slice of a fused tensor. Chosen by cli/ from --train, read by
// parameter_store.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"            // Model, TensorSlice
#include "train/gradient_slots.h"   // GradientSlots
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

enum class WeightPlace : uint8_t {
  kInputNorm,
  kPostAttentionNorm,
  kQ,
  kK,
  kV,
  kO,
  kQBias,
  kKBias,
  kVBias,
  kOBias,
  kQNorm,
  kKNorm,
  kRouter,
  kSharedRouter,
  kGate,  // of a SwiGLU
  kUp,
  kDown,
  kFinalNorm,
};

// Which SwiGLU a gate, up or down belongs to: an expert's number, or one of these.
inline constexpr int32_t kSharedOwner = -1, kDenseOwner = -2;

struct Parameter {
  TensorSlice slice;
  int32_t layer = -1;  // -1: the final norm
  WeightPlace place = WeightPlace::kInputNorm;
  int32_t owner = 0;
  uint64_t offset = 0;  // first element among all parameters
  uint64_t count = 0;

  // Unique: the tensor's name, with the first element behind it if it is a slice.
  std::string Name() const;
};

// `what`: comma-separated, each `condensed-experts` (gate, up and down of what is left of condensed
// layers), `experts` (of all layers, shared experts too), `router`, `norms`, or a pattern with *
// and ? on tensor names. By layer, ascending, the final norm last. UsageError if a part of `what`
// fits nothing, or something that is never trained (embedding, lm_head).
std::vector<Parameter> ChooseParameters(const Model& model, const std::string& what);

bool MatchesPattern(const std::string& name, const std::string& pattern);

// Where a parameter is in a layer's weights: a matrix or a vector, the other null.
WeightMatrix* MatrixOf(LayerWeights& weights, const Parameter& parameter);
std::vector<float>* VectorOf(LayerWeights& weights, const Parameter& parameter);
float*& SlotOf(GradientSlots& slots, const Parameter& parameter);

}  // namespace winnow
