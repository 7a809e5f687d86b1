// How well integer codes fit a group of weights, for many candidate scales at once: what the search
// for a scale spends its time in (quantize/).
#pragma once

#include <cstdint>
#include <span>

namespace winnow {

// A weight x takes the code q = clamp(round(x * inverse_scale + offset), low, high).
struct CodeCandidate {
  float inverse_scale = 0;
  float offset = 0;
};
// With r = x * inverse_scale + offset - q, what rounding leaves in units of the scale: sums of
// weight times r r, r, r q, q and q q. A better scale and offset for the same codes follow from
// them without cancellation.
struct CodeSums {
  float rr = 0, r = 0, rq = 0, q = 0, qq = 0;
};

// x and weight [n], n a multiple of 16 (padding has weight 0). The order of a sum depends on the
// instruction set alone. `sums` has one element for each candidate.
void SumCodes(const float* x, const float* weight, int64_t n, float low, float high,
              std::span<const CodeCandidate> candidates, CodeSums* sums);
void SumCodesReference(const float* x, const float* weight, int64_t n, float low, float high,
                       std::span<const CodeCandidate> candidates, CodeSums* sums);

// What a code may stand for: whole numbers from low to high, or `levels`, ascending, 2 to 16 of
// them.
struct CodeGrid {
  float low = 0, high = 0;
  std::span<const float> levels;
};
// rr alone, q the nearest of the grid: for searches among what can be stored.
void SumErrors(const float* x, const float* weight, int64_t n, const CodeGrid& grid,
               std::span<const CodeCandidate> candidates, float* errors);
void SumErrorsReference(const float* x, const float* weight, int64_t n, const CodeGrid& grid,
                        std::span<const CodeCandidate> candidates, float* errors);

}  // namespace winnow
