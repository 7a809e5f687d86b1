// `winnow finetune`: AdamW steps on chosen weights of a model, everything else frozen
// (docs/METHODS.md). Called by cli/cmd_finetune.cc, which reads rows and writes the checkpoint.
//
// Crash-safe: masters, moments and everything said so far are saved in the working folder now and
// then, by rename; a resumed run gives the same bytes as one that was never stopped.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apply/weight_replacements.h"  // WeightReplacements
#include "base/memory.h"                // MemoryPlan
#include "base/progress.h"              // JobControl
#include "base/thread_pool.h"           // ThreadPool
#include "model/model.h"                // Model
#include "train/batch_pass.h"           // PassOptions
#include "train/schedule.h"             // Schedule
#include "train/train_data.h"           // TrainRow

namespace winnow {

struct TrainOptions {
  std::vector<Parameter> parameters = {};
  Schedule schedule = {};
  double weight_decay = 0.01;
  double clip = 1.0;                // of the gradient's norm; 0: none
  PassOptions pass = {};            // how memory is used comes from the plan
  std::optional<Dtype> dtype = {};  // of the trained weights; nothing: as stored
  bool pure_bf16 = false;
  int64_t eval_every = 0;  // steps between scores of held-out rows; 0: before and after alone
  int64_t patience = 0;  // scores without a better one before it stops; 0: never. The best is kept
  double checkpoint_seconds = 60;
  uint64_t memory_budget_bytes = 0;
  bool resume = false;
};

struct TrainRows {
  std::vector<TrainRow> rows;
  std::vector<std::vector<int32_t>> steps;  // rows of each
  std::vector<int32_t> held_out;
};

struct TrainPlan {
  MemoryPlan memory;
  bool resident = false, prefetch = false, keep_tapes = false;
  bool spill_state = false, spill_streams = false;
  uint64_t bytes_to_write = 0;  // in the working folder
};
// The fastest way that fits the budget; ResourceError if there is none.
TrainPlan PlanTrain(const Model& model, const TrainRows& rows, const TrainOptions& options,
                    int num_threads);

struct StepRecord {
  int64_t step = 0;
  double lr = 0;
  double loss = 0;
  double gradient_norm = 0;             // before clipping
  std::optional<double> held_out = {};  // after the step
};

struct TrainResult {
  std::vector<StepRecord> steps;
  std::optional<double> held_out_before, held_out_after;
  int64_t best_step = -1;  // whose weights are kept, if that is not the last
  bool stopped_early = false;
  int64_t tokens = 0;  // trained on by this process
  double seconds = 0;  // of its steps
  fs::path weights;    // safetensors of what was trained, by Parameter::Name()
};
// `on_step` sees every step in order, those of an interrupted run too.
TrainResult RunTrain(const Model& model, const TrainRows& rows, const TrainOptions& options,
                     const TrainPlan& plan, const fs::path& folder, ThreadPool& pool,
                     const JobControl& control,
                     const std::function<void(const StepRecord&)>& on_step);

// The trained weights of `file` at their places in the model.
WeightReplacements TrainedWeights(const std::vector<Parameter>& parameters, const fs::path& file);

}  // namespace winnow
