// `winnow observe --method cd-moe`: one layer-major pass over two texts that answers every question
// of CD-MoE's expert search (arXiv 2412.00069): on the one text the mean weight the router gives to
// each expert, on the other, layer by layer, the greedy order of experts (expert_search.h).
// Crash-safe like every pass: what is finished lies in OUT.partial, a resumed run writes the same
// bytes, OUT appears by rename.
#pragma once

#include <cstdint>
#include <vector>

#include "base/memory.h"              // MemoryPlan
#include "base/progress.h"            // JobControl
#include "base/thread_pool.h"         // ThreadPool
#include "condense/condense_stats.h"  // CondenseStats
#include "kernels/matmul.h"           // ComputePrecision
#include "model/model.h"              // Model
#include "text/block_builder.h"       // SourceBlocks

namespace winnow {

enum class CondenseMethod : uint8_t {
  kExperts,  // CD-MoE's greedy search of whole experts
  kNeurons,  // single neurons of all experts by least squares (neuron_choice.h)
};

// Neurons of a layer, those of its shared expert among them, whose moments are taken: 2 x 1.2 GB.
inline constexpr int64_t kMostNeurons = 12288;
// No machine holds the moments of more.
inline constexpr int64_t kNeuronsAtMost = int64_t{1} << 20;

// Of how many neurons of the experts of a layer `kNeurons` chooses `width` experts' worth: of all
// if they are no more than `most_neurons` with those of the shared expert; else of the three times
// as many that have the most energy, or of as many as that leaves room for. 0: of whole experts,
// because it does not leave room for half as many again.
int64_t CandidateNeurons(const ModelConfig& config, const LayerConfig& layer, int64_t width,
                         int64_t most_neurons);

struct CondenseOptions {
  CondenseMethod method = CondenseMethod::kExperts;
  int64_t max_experts = 0;  // of the search, in each layer; of the width, in experts' worth
  int64_t most_neurons = kMostNeurons;  // see CandidateNeurons
  ComputePrecision compute = ComputePrecision::kF32;
  bool resume = false;
  // Streams are saved when a layer ends at least this long after the last save.
  double checkpoint_seconds = 1.0;
  uint64_t memory_budget_bytes = 0;
};

// What will be held and how: decided before anything is read.
struct CondensePlan {
  CondenseStats stats;  // without layers' results
  TokenSet search;
  TokenSet alpha;  // empty: the search text is both
  MemoryPlan memory;
  bool prefetch = true;
  bool spill_streams = false;
  bool spill_outputs = false;
  uint64_t disk_bytes = 0;
};
// `alpha` may be empty: then the weights are averaged over the search text. ResourceError with the
// smallest budget that works if none fits.
CondensePlan PlanCondense(const Model& model, const std::vector<SourceBlocks>& search,
                          const std::vector<SourceBlocks>& alpha, const CondenseOptions& options,
                          int num_threads);

CondenseStats RunCondense(const Model& model, const CondenseOptions& options,
                          const CondensePlan& plan, const fs::path& output, ThreadPool& pool,
                          const JobControl& control);

}  // namespace winnow
