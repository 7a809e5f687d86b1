// CD-MoE's greedy choice of the experts that stay in a condensed layer (arXiv 2412.00069, section
// 3; docs/METHODS.md), one layer at a time: starting from the shared expert alone, the expert whose
// addition brings the layer's output state closest to the intact one is added, again and again.
// Closest: the mean over documents of the mean over tokens of the Jensen-Shannon divergence of the
// two states' softmax over channels. The published program runs the whole model for every
// candidate; here the sum so far is kept as one vector a token, which gives the same numbers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/progress.h"            // JobControl
#include "base/thread_pool.h"         // ThreadPool
#include "condense/expert_outputs.h"  // ExpertOutputs

namespace winnow {

struct ExpertSearchInput {
  int64_t hidden = 0;
  std::span<const int64_t> offsets;      // of the documents, [n + 1]
  std::span<const float> probabilities;  // [T, hidden] softmax of the intact state after the layer
  std::span<float> base;                 // [T, hidden] state before the block + shared expert;
                                         // becomes the sum with the chosen experts
  ExpertOutputs& outputs;
  std::span<const double> alphas;      // [E]
  const float* norm_weight = nullptr;  // [hidden] of the final norm, for the last layer
  float norm_eps = 0;
  int64_t max_experts = 0;
};

// One step of a greedy search: what was tried and what was taken.
struct GreedyStep {
  int32_t chosen = 0;
  double divergence = 0;
  std::vector<double> candidates;  // in ascending index of what was left
};

// Of an expert's outputs in hand while searching.
inline constexpr int64_t kSearchChunkTokens = 4096;

std::vector<GreedyStep> SearchExperts(const ExpertSearchInput& input, ThreadPool& pool,
                                      const JobControl& control);

// Mean over documents of the mean over their tokens; `values` [T], tokens in order.
double MeanOverDocuments(std::span<const double> values, int64_t stride,
                         std::span<const int64_t> offsets);

// What a search holds besides its input.
uint64_t ExpertSearchBytes(int64_t num_tokens, int64_t num_experts, int64_t hidden,
                           int num_threads);

}  // namespace winnow
