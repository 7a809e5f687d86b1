// Token-by-token generation with a key-value cache: the whole model in memory if the budget holds
// it, else a layer at a time for every token (slow, but it runs).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
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
// `capacity`: tokens of prompt and answer together.
GeneratePlan PlanGenerate(const Model& model, int64_t capacity, const GenerateOptions& options,
                          int num_threads);

struct GenerateResult {
  std::vector<int32_t> tokens;  // without the prompt
  double load_seconds = 0;
  double prompt_seconds = 0;
  double decode_seconds = 0;
  int64_t cached_tokens = 0;   // of the prompt, not read again
  int64_t decoded_tokens = 0;  // that went through the model: the last new one need not
  // Of decoded tokens, with all weights in memory: what was read of them, and experts a MoE layer.
  double bytes_per_token = 0;
  double experts_per_token = 0;
  std::optional<SkipCounts> skipping;  // if experts were skipped
};

// A model ready to generate, for one prompt after another: what a prompt shares with the beginning
// of the one before is not read again.
class Generator {
 public:
  // `capacity`: tokens of prompt and answer together, as planned. The others must outlive it.
  Generator(const Model& model, int64_t capacity, GenerateOptions options, const GeneratePlan& plan,
            ThreadPool& pool, const JobControl& control);
  ~Generator();

  // on_token is called for each new token and stops the generation by returning false. UsageError
  // if the prompt is empty or leaves no room.
  GenerateResult Run(std::span<const int32_t> prompt, const std::function<bool(int32_t)>& on_token);

 private:
  class NextLogits;
  class ResidentModel;
  class StreamedModel;
  int64_t ReadPrompt(std::span<const int32_t> prompt, std::span<float> logits);
  const Model& model_;
  const int64_t capacity_;
  const GenerateOptions options_;
  double load_seconds_ = 0;
  std::unique_ptr<NextLogits> next_;
  const ResidentModel* resident_ = nullptr;  // next_, if it is one
  std::vector<int32_t> prompt_;              // what next_ holds of prompts
};

// One prompt with room for max_new_tokens.
GenerateResult Generate(const Model& model, std::span<const int32_t> prompt,
                        const GenerateOptions& options, const GeneratePlan& plan, ThreadPool& pool,
                        const JobControl& control, const std::function<bool(int32_t)>& on_token);

// One draw from logits [V]; `state` is the generator of the sequence and is advanced.
int32_t SampleToken(std::span<const float> logits, const SamplingOptions& options, uint64_t& state);
// The same among ids below `vocabulary_limit` (0: all). ModelError if what was drawn has no finite
// score.
int32_t DrawToken(std::span<const float> logits, int64_t vocabulary_limit,
                  const SamplingOptions& options, uint64_t& state);

}  // namespace winnow
