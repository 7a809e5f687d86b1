// Cosines and sines of rotary positions, computed as the reference does: inverse frequencies and
// angles in f32.
#pragma once

#include <cstdint>
#include <vector>

#include "model/model_config.h"  // RopeConfig

namespace winnow {

class RopeTable {
 public:
  RopeTable(const RopeConfig& rope, int64_t head_dim);
  // Makes positions 0..count-1 available.
  void Extend(int64_t count);
  int64_t half() const { return half_; }
  const float* cos(int64_t position) const { return cos_.data() + position * half_; }
  const float* sin(int64_t position) const { return sin_.data() + position * half_; }

 private:
  int64_t half_;
  std::vector<float> inverse_frequencies_;  // [half]
  std::vector<float> cos_, sin_;            // [positions, half]
};

}  // namespace winnow
