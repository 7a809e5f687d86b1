// What a model's weights are and take, by part and format: for `winnow inspect` and model cards.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"  // Model, LayerFormats

namespace winnow {

struct WeightPart {
  std::string part;    // "experts", "attention", "shared expert", "dense", "lm_head", ...
  std::string format;  // "4bit", or a dtype: "BF16"
  uint64_t matrices = 0;
  uint64_t weights = 0;
  uint64_t bytes = 0;  // scales included, padding of extents not

  double bits_per_weight() const {
    return weights == 0 ? 0 : 8 * static_cast<double>(bytes) / static_cast<double>(weights);
  }
};

// Matrices alone: norms and biases are left out. Parts in the order above, formats in the order
// they are met.
std::vector<WeightPart> WeightParts(const Model& model);
// The same as it will be in other formats (empty ones: as the model stores it). `layers` has one
// for each layer.
std::vector<WeightPart> WeightParts(const Model& model, const std::vector<LayerFormats>& layers,
                                    const PackedFormat& lm_head);

}  // namespace winnow
