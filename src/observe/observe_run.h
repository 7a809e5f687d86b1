// `winnow observe`: one layer-major pass over the calibration tokens that writes a statistics
// folder. Crash-safe: each finished layer's statistics are on disk under OUT.partial, with the
// residual stream beside them from time to time; a resumed run writes the same bytes. OUT appears
// by rename.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"         // MemoryPlan
#include "base/progress.h"       // JobControl
#include "base/thread_pool.h"    // ThreadPool
#include "kernels/matmul.h"      // ComputePrecision
#include "model/model.h"         // Model
#include "observe/stats_info.h"  // StatsInfo, StatsLevel
#include "text/block_builder.h"  // SourceBlocks

namespace winnow {

// Chooses the survivors of a layer from its finished statistics file (progressive runs).
using ChooseSurvivors = std::function<std::vector<int32_t>(
    const fs::path& stats_folder, const StatsInfo& info, const StatsLayer& layer)>;

struct ObserveOptions {
  std::optional<StatsLevel> level = {};  // nothing: full if it fits disk and budget, else routed
  int64_t batch = 8;
  ComputePrecision compute = ComputePrecision::kF32;
  // Two-stream sweep: survivors per MoE layer; `choose` must be set too.
  std::optional<int64_t> progressive_keep = {};
  ProgressiveTarget progressive_target = ProgressiveTarget::kPublished;
  ChooseSurvivors choose = {};
  bool resume = false;
  // The stream is saved when a layer ends at least this long after the last save.
  double checkpoint_seconds = 1.0;
  uint64_t memory_budget_bytes = 0;
  // Experts to use of each layer (what-if plans); empty = all.
  std::vector<std::vector<int32_t>> kept_experts = {};
};

// What will be held and how: decided before anything is read.
struct ObservePlan {
  StatsInfo info;
  MemoryPlan memory;
  bool prefetch = true;
  bool spill = false;  // the stream lives in a file
  uint64_t stats_bytes = 0;
  double tera_flop = 0;  // matrix products of the pass
};
// ResourceError with the smallest budget that works if none fits.
ObservePlan PlanObserve(const Model& model, const std::vector<SourceBlocks>& sources,
                        const ObserveOptions& options, int num_threads);

struct ObserveResult {
  uint64_t bytes_read = 0;     // of weights
  double wait_seconds = 0;     // for the disk
  int64_t resumed_layers = 0;  // layers that were there already
};
ObserveResult RunObserve(const Model& model, const std::vector<SourceBlocks>& sources,
                         const ObserveOptions& options, const ObservePlan& plan,
                         const fs::path& output, ThreadPool& pool, const JobControl& control);

}  // namespace winnow
