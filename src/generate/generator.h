// Token-by-token generation with a key-value cache: the whole model in memory if the budget holds
// it, else a layer at a time for every token (slow, but it runs).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/memory.h"              // MemoryPlan
#include "base/progress.h"            // JobControl
#include "base/thread_pool.h"         // ThreadPool
#include "forward/expert_skipping.h"  // SkipBetas, SkipCounts
#include "kernels/matmul.h"           // ComputePrecision
#include "model/model.h"              // Model

namespace winnow {

struct SamplingOptions {
  float temperature = 0.0f;  // 0: greedy, the lowest id wins ties
  int64_t top_k = 0;         // 0: all
  float top_p = 1.0f;
  uint64_t seed = 42;
};

struct GenerateOptions {
  SamplingOptions sampling = {};
  int64_t max_new_tokens = 128;
  int64_t vocabulary_limit =
      0;  // ids from here on are never sampled (rows without a token); 0: none
  bool stop_at_eos = true;
  uint64_t memory_budget_bytes = 0;
  ComputePrecision compute = ComputePrecision::kF32;  // of the prompt
  std::vector<std::vector<int32_t>> kept_experts = {};
  SkipBetas skip_betas = {};  // empty: every expert runs
};

struct GeneratePlan {
  MemoryPlan memory;
  bool resident = true;
};
GeneratePlan PlanGenerate(const Model& model, int64_t prompt_tokens, const GenerateOptions& options,
                          int num_threads);

struct GenerateResult {
  std::vector<int32_t> tokens;  // without the prompt
  double load_seconds = 0;
  double prompt_seconds = 0;
  double decode_seconds = 0;  // of tokens.size() - 1 tokens, or of all if the text ended
  // Of decoded tokens, with all weights in memory: what was read of them, and experts a MoE layer.
  double bytes_per_token = 0;
  double experts_per_token = 0;
  std::optional<SkipCounts> skipping;  // if experts were skipped
};
// on_token is called for each new token and stops the generation by returning false.
GenerateResult Generate(const Model& model, std::span<const int32_t> prompt,
                        const GenerateOptions& options, const GeneratePlan& plan, ThreadPool& pool,
                        const JobControl& control, const std::function<bool(int32_t)>& on_token);

// One draw from logits [V]; `state` is the generator of the sequence and is advanced.
int32_t SampleToken(std::span<const float> logits, const SamplingOptions& options, uint64_t& state);

}  // namespace winnow
