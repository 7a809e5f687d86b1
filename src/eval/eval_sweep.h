// What every evaluation does with its tokens: all of them through the layers, one layer at a time,
// then log-likelihoods of the ids asked for. Used by perplexity and by tasks, who decide what the
// tokens are and what the numbers mean. The same bits for any number of threads and any budget.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/memory.h"              // MemoryPlan
#include "base/progress.h"            // JobControl
#include "base/thread_pool.h"         // ThreadPool
#include "forward/expert_skipping.h"  // SkipBetas, SkipCounts
#include "forward/hidden_states.h"    // HiddenStates
#include "forward/token_set.h"        // TokenSet
#include "kernels/matmul.h"           // ComputePrecision
#include "model/model.h"              // Model

namespace winnow {

struct EvalOptions {
  uint64_t memory_budget_bytes = 0;
  fs::path spill_folder = {};  // where the stream goes if the budget does not hold it
  std::vector<std::vector<int32_t>> kept_experts = {};
  ComputePrecision compute = ComputePrecision::kF32;  // of the layers; lm_head is always f32
  SkipBetas skip_betas = {};                          // empty: every expert runs
};

struct EvalPlan {
  MemoryPlan memory;
  bool prefetch = true;
  bool spill = false;
};
// What fits the budget, the fastest first. `bookkeeping_bytes`: what the caller holds beside the
// tokens, such as ids to score and their scores. ResourceError if nothing fits.
EvalPlan PlanEval(const Model& model, const TokenSet& tokens, uint64_t bookkeeping_bytes,
                  const EvalOptions& options, int num_threads);

struct SweptStates {
  std::unique_ptr<HiddenStates> states;  // after the last layer
  std::optional<SkipCounts> skipping;    // of all positions, if experts were skipped
};
// Every token through every layer. Each weight is read once.
SweptStates SweepLayers(const Model& model, const TokenSet& tokens, const EvalOptions& options,
                        const EvalPlan& plan, ThreadPool& pool, const JobControl& control);

// An id whose likelihood is asked for: that the token at `position` of the set is followed by it.
// Several may ask at one position.
struct TokenTarget {
  int64_t position = 0;
  int32_t id = 0;
};
struct TokenScore {
  double log_likelihood = 0;  // natural log; not finite if the logits are not
  bool is_greedy = false;     // no id has a higher logit
};
// UsageError if an id is beyond the model's vocabulary; negative ones stand for nothing.
void RequireIdsInVocabulary(const Model& model, std::span<const int32_t> ids);
// Scores in the order of `targets`, which are in the order of the set's sequences. lm_head is read
// once, a chunk of the vocabulary at a time, and multiplied with the rows asked for alone.
std::vector<TokenScore> ScoreTargets(const Model& model, const TokenSet& tokens,
                                     std::span<const TokenTarget> targets, HiddenStates& states,
                                     ThreadPool& pool, const JobControl& control);
// What ScoreTargets returns and holds for each target.
inline constexpr uint64_t kTargetScoreBytes = 48;

}  // namespace winnow
