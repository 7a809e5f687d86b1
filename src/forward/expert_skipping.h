// Skipping experts at run time (NAEE, arXiv 2402.14800, section 3.3): of the k experts a router
// selects, those whose probability is less than beta times the highest are not run; the weights of
// the others are renormalised where the family does it.
#pragma once

#include <cstdint>
#include <vector>

namespace winnow {

// beta of each decoder layer; 0 or missing: nothing is skipped.
using SkipBetas = std::vector<double>;

// What skipping did, of each decoder layer.
struct SkipCounts {
  std::vector<int64_t> tokens;         // that went through the layer's router
  std::vector<int64_t> experts;        // run for them in all
  std::vector<int64_t> reduced;        // tokens with fewer than k
  std::vector<double> dropped_weight;  // sum of the share of the k probabilities not used
};

}  // namespace winnow
