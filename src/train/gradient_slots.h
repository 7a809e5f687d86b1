// Where the gradients of a layer's weights go: the shape of LayerWeights with a pointer in place of
// each weight, null for what is frozen. Gradients are added, so that parts of a batch sum up.
// parameter_store fills it, layer_gradient writes through it.
#pragma once

#include <vector>

namespace winnow {

struct FeedForwardSlots {
  float *gate = nullptr, *up = nullptr, *down = nullptr;
  bool any() const { return gate != nullptr || up != nullptr || down != nullptr; }
};

struct GradientSlots {
  float *input_norm = nullptr, *post_attention_norm = nullptr;
  float *q = nullptr, *k = nullptr, *v = nullptr, *o = nullptr;
  float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  float *q_norm = nullptr, *k_norm = nullptr;
  float *router = nullptr, *shared_router = nullptr;
  std::vector<FeedForwardSlots> experts;  // up to the last that is trained
  FeedForwardSlots shared, dense;

  // Anything before the scores of attention, in it, or in the norm above it.
  bool any_projection() const {
    return input_norm != nullptr || q != nullptr || k != nullptr || v != nullptr ||
           q_bias != nullptr || k_bias != nullptr || v_bias != nullptr || q_norm != nullptr ||
           k_norm != nullptr;
  }
  bool any_attention() const { return any_projection() || o != nullptr || o_bias != nullptr; }
};

}  // namespace winnow
