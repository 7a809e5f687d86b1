// Shares bytes among experts so that the whole error is least: each expert has a few candidate
// formats with a size and a measured error. Pure arithmetic; expert_errors.h measures.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace winnow {

// One expert: candidates by ascending bytes, the same number and order for every expert.
struct AllocationItem {
  std::vector<uint64_t> bytes;
  std::vector<double> error;  // not negative
};

struct Allocation {
  std::vector<int32_t> choice;  // [items] of candidates
  uint64_t bytes = 0;
  double error = 0;          // their sums
  double uniform_error = 0;  // of the best single candidate for all that fits
  int32_t uniform_choice = 0;
};

// The least sum of errors found within `budget` bytes. Starts from everybody's smallest candidate
// and takes the step of the largest gain for its bytes along each item's convex hull, then fills
// what is left with any step that fits. Never worse than the best uniform choice. Deterministic:
// equal gains go to the earlier item. UsageError if the smallest candidates do not fit.
Allocation AllocateBits(std::span<const AllocationItem> items, uint64_t budget);

}  // namespace winnow
