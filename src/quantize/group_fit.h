// The scale and minimum of one group of weights, for rounding.cc and compensated_rounding.cc.
#pragma once

#include <cstdint>
#include <vector>

#include "base/packed_format.h"  // PackedFormat, PackedGrid
#include "kernels/code_sums.h"   // CodeCandidate, CodeSums

namespace winnow {

// A scale and a minimum as stored, with what rounding to the nearest code needs of them.
struct GroupScale {
  uint16_t scale_bits = 0;
  uint16_t minimum_bits = 0;  // f16; with kAsymmetric alone
  float scale = 0;            // what they say: DecodeGroup
  float minimum = 0;
};

// Searches the scale of a group. Keeps its candidates and buffers between groups; one for a thread.
class GroupFitter {
 public:
  explicit GroupFitter(const PackedFormat& format);

  // The scale whose weighted squared error over x [count] is the least found, count <=
  // group_columns. `weight` [count] not negative; all zero counts as all one. ModelError if no f16
  // is large enough.
  GroupScale Fit(const float* x, const float* weight, int64_t count);

  // The nearest code of a weight, and its value as the kernels compute it.
  uint8_t Code(const GroupScale& group, float x) const;
  float Value(const GroupScale& group, uint8_t code) const;

 private:
  GroupScale FitSymmetric();
  GroupScale FitAsymmetric();
  GroupScale FitLogarithmic();
  GroupScale FitShifted();
  void TryShifted(GroupScale* best, double* best_error);
  void AddShifts(int scale_code, int first, int last, int step);
  double Refine(float scale, float minimum, GroupScale* best, double best_error);
  GroupScale SearchCandidates();
  void AddCandidate(float scale, float minimum);
  GroupScale Stored(float scale, float minimum) const;
  GroupScale Decoded(uint16_t scale_bits, uint16_t minimum_bits) const;

  PackedFormat format_;
  float low_ = 0, high_ = 0;      // codes; signed with kSymmetric
  std::vector<float> positions_;  // kSymmetric: codes the largest weight may take
  std::vector<float> clips_;      // kAsymmetric: shares of the range cut off at either end
  std::vector<float> levels_;     // of grids with levels: what a code stands for
  // The group being fitted, padded to 16.
  std::vector<float> x_, weight_;
  int64_t count_ = 0, padded_ = 0;
  float largest_ = 0, smallest_ = 0;  // weights that count
  double weight_sum_ = 0, square_sum_ = 0;
  std::vector<CodeCandidate> candidates_;
  std::vector<uint16_t> candidate_bits_;  // HasShift: the scale of each
  std::vector<CodeSums> sums_;
  std::vector<float> errors_;
};

}  // namespace winnow
