// What a condensed layer is made of, as data: the recipe from which its dense SwiGLU is built. A
// plan says it, weights/ builds it, heal/ and apply/ use it.
#pragma once

#include <cstdint>
#include <vector>

namespace winnow {

// CD-MoE's weight of an expert that no calibration token selected, as published.
inline constexpr double kUnselectedAlpha = 0.06;

struct FusedPart {
  static constexpr int32_t kShared = -1;
  int32_t expert = kShared;           // of the layer, or the shared expert
  double alpha = 1;                   // folded into the down projection
  std::vector<int32_t> neurons = {};  // rows of gate and up, columns of down; empty: all
};

}  // namespace winnow
