// Ridge regression of a layer's down projections on what pruning left of its error: the closed form
// that repairs a pruned layer without gradients.
//
//   min over dW of  sum_t c_t || R_t - sum_e dW_e p_t,e ||^2 + lambda sum_e d_e || dW_e ||^2
//
// with p_t,e = w_t,e silu(gate) * up of expert e (the rows of ActivationStore), R_t what the
// layer's output lacks, c_t the token's weight and d_e the mean of the diagonal of sum_t c_t p p^T,
// so that one lambda suits experts that are used much and little. All experts are fitted jointly,
// by block coordinate descent over them: each step is the exact minimum over one expert's columns,
// wide experts being several blocks; an expert with fewer tokens than columns is solved in the
// space of its tokens, which gives the same step for less. lambda runs from high to low, one sweep
// each, warm; with the one of the least error on held-out tokens all tokens are fitted from there.
// If none is better than no step at all, nothing changes.
//
// Deterministic for any number of threads: products in f32 by MatMul, sums over tokens in double in
// a fixed order.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/progress.h"          // JobControl
#include "base/thread_pool.h"       // ThreadPool
#include "heal/activation_store.h"  // ActivationStore

namespace winnow {

struct RefitInput {
  const ActivationStore& activations;
  int64_t hidden = 0;
  std::span<const float> residual;    // [T, hidden]
  std::span<const float> weight;      // [T] c
  std::span<const uint8_t> held_out;  // [T] 1: chooses lambda
};

struct RefitOptions {
  // For Gram matrices kept between sweeps; without it they are computed again each time.
  uint64_t cache_bytes = 0;
  // Sweeps over all blocks at the chosen lambda, from the solution without held-out tokens: 2 of
  // them reach the joint solution's quality.
  int sweeps = 2;
};

struct RefitStep {
  int32_t expert = 0;           // as in ActivationStore
  AlignedBuffer<float> change;  // [hidden, width], to be added to the down projection
};

struct LayerRefit {
  double lambda = 0;  // 0: no step
  // sum c |R|^2 over held-out tokens before any step and at the chosen lambda (fitted without
  // them).
  double held_out_before = 0, held_out_after = 0;
  int64_t skipped_experts = 0;   // too few tokens to be fitted
  std::vector<RefitStep> steps;  // empty without a step
};

// Experts with fewer rows than this keep their weights.
inline constexpr int64_t kLeastRefitRows = 16;

LayerRefit RefitDownProjections(const RefitInput& input, const RefitOptions& options,
                                ThreadPool& pool, const JobControl& control);

// What a refit holds besides the activations, for memory plans: `widths` of all blocks.
uint64_t RefitBytes(int64_t num_tokens, int64_t hidden, std::span<const int64_t> widths);
// Of all Gram matrices, for RefitOptions::cache_bytes.
uint64_t RefitCacheBytes(std::span<const int64_t> widths);

}  // namespace winnow
