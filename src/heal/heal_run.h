// Healing a pruned model without gradients (docs/METHODS.md): one sweep from the bottom refits the
// survivors' down projections, and the shared expert's, so that the pruned and already refitted
// stream comes back to the intact one. Two streams run side by side, the intact model's and the
// healed one's; each MoE layer is refitted (ridge_refit.h) on R = h'* - h', what the healed stream
// lacks after the layer, tokens weighted by 1 / |h'*|^2. The new weights are rounded to the
// checkpoint's format before the healed stream goes on with them.
//
// Sequences are split three ways within every source: most fit the weights, one in five chooses
// lambda, one in ten is seen by no fit: its nll decides at the end whether healing is kept.
//
// Crash-safe: each layer's weights are on disk when it is done; a resumed run reads them back and
// gives the same bytes.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "base/memory.h"         // MemoryPlan
#include "base/progress.h"       // JobControl
#include "base/thread_pool.h"    // ThreadPool
#include "eval/perplexity.h"     // PerplexityResult, ScoredWindows
#include "kernels/matmul.h"      // ComputePrecision
#include "model/fused_part.h"    // FusedPart
#include "model/model.h"         // Model
#include "text/block_builder.h"  // SourceBlocks

namespace winnow {

struct HealOptions {
  // Survivors of each decoder layer, as the plan says.
  std::vector<std::vector<int32_t>> kept_experts = {};
  // Layers that lose their router: what each is fused of, by decoder layer. The down projection of
  // the fused SwiGLU is refitted whole.
  std::map<int32_t, std::vector<FusedPart>> condensed = {};
  ComputePrecision compute = ComputePrecision::kF32;
  uint64_t memory_budget_bytes = 0;
  bool resume = false;
};

struct HealPlan {
  TokenSet fit;                   // sequences that fit or choose lambda
  std::vector<uint8_t> held_out;  // of each token of `fit`: chooses lambda
  ScoredWindows confirm;          // sequences that only judge
  MemoryPlan memory;
  bool prefetch = true;
  bool spill = false;           // streams and activations live in files
  uint64_t cache_bytes = 0;     // for Gram matrices
  uint64_t bytes_to_write = 0;  // healed weights
};
// The sequences of calibration that only judge, for others who compare models on them. UsageError
// if there are none.
ScoredWindows JudgingSequences(const std::vector<SourceBlocks>& sources);
// The calibration without them, for fits that are judged by them.
std::vector<SourceBlocks> FittingSequences(const std::vector<SourceBlocks>& sources);
// ResourceError if no way to hold it fits the budget, UsageError if there are too few sequences.
HealPlan PlanHeal(const Model& model, const std::vector<SourceBlocks>& sources,
                  const HealOptions& options, int num_threads);

struct HealedLayer {
  int32_t layer = 0;
  double lambda = 0;  // 0: unchanged
  // sqrt of the mean of |R|^2 / |h'*|^2 over held-out tokens.
  double error_before = 0, error_after = 0;
  int64_t skipped_experts = 0;
};

struct HealResult {
  std::vector<HealedLayer> layers;
  PerplexityResult intact, pruned, healed;  // of the sequences that judge
  // Whether the healed weights are worth keeping.
  bool improves() const { return healed.nll < pruned.nll; }
};
// Writes healed weights into `folder` (created), a file per refitted layer.
HealResult RunHeal(const Model& model, const HealOptions& options, const HealPlan& plan,
                   const fs::path& folder, ThreadPool& pool, const JobControl& control);

// Files of `folder` and the names of the tensors in them: the down projection of expert `expert` of
// the original model, -1 for the shared one or -2 for a condensed layer's, in the checkpoint's own
// format.
fs::path HealedLayerPath(const fs::path& folder, int64_t layer);
std::string HealedTensorName(int32_t expert);

}  // namespace winnow
