// Which layers to condense, given what each would become. Two orders:
//
//   greedy   as published (CD-MoE, arXiv 2412.00069, section 3): again and again the layer whose
//            condensation, together with those chosen before, keeps the final state (after the
//            final norm) closest to the intact model's: mean Jensen-Shannon divergence over
//            documents.
//   single   each layer alone: KL divergence of the final logits from the intact model's, one pass.
//
// The published program runs the whole model for each candidate. Here all candidates of a step go
// up the layers side by side, each starting at its own layer from the state that the layers chosen
// so far leave there: every weight is read once a step, and a candidate costs the layers above it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "base/memory.h"             // MemoryPlan
#include "base/progress.h"           // JobControl
#include "base/thread_pool.h"        // ThreadPool
#include "condense/expert_search.h"  // GreedyStep
#include "forward/token_set.h"       // TokenSet
#include "kernels/matmul.h"          // ComputePrecision
#include "model/model.h"             // Model
#include "weights/layer_weights.h"   // LayerWeights

namespace winnow {

// A condensed layer and the memory of what it does not share with the intact one.
struct CondensedWeights {
  LayerWeights weights;
  AlignedBuffer<std::byte> storage;
};
// What the MoE layer of this index (among MoE layers) would become.
using CondenseWeights =
    std::function<CondensedWeights(int64_t moe_layer, const LayerWeights& intact)>;

struct LayerSearchOptions {
  int64_t num_layers = 0;  // to choose
  ComputePrecision compute = ComputePrecision::kF32;
  uint64_t memory_budget_bytes = 0;
  fs::path spill_folder = {};  // for streams that the budget does not hold
};

struct LayerSearchPlan {
  MemoryPlan memory;
  bool resident = true;  // all layers stay in memory
  bool prefetch = true;
  bool spill = false;
};
// ResourceError with the smallest budget that works if none fits.
LayerSearchPlan PlanLayerSearch(const Model& model, const TokenSet& tokens,
                                const LayerSearchOptions& options, int num_threads);

// Steps in the order chosen; `chosen` and candidates count MoE layers.
std::vector<GreedyStep> SearchLayersGreedily(const Model& model, const TokenSet& tokens,
                                             const CondenseWeights& condense,
                                             const LayerSearchOptions& options,
                                             const LayerSearchPlan& plan, ThreadPool& pool,
                                             const JobControl& control);

// Mean over tokens of KL(intact || one layer condensed) of the next-token distributions, by MoE
// layer.
std::vector<double> SingleLayerKl(const Model& model, const TokenSet& tokens,
                                  const CondenseWeights& condense,
                                  const LayerSearchOptions& options, const LayerSearchPlan& plan,
                                  ThreadPool& pool, const JobControl& control);

}  // namespace winnow
