// `winnow quantize --calib`: rounds a model layer by layer on calibration text. The stream is the
// quantised model's own: each layer sees what the rounded layers before it make of the text, so
// that a layer is rounded for the inputs it will get. Attention first, then per expert gate and up
// on the tokens routed to it, then its down projection on what the rounded gate and up give it.
//
// One layer, one matrix's moments and the stream are held, whatever the number of layers.
#pragma once

#include <cstdint>
#include <vector>

#include "base/file.h"               // fs
#include "base/memory.h"             // MemoryPlan
#include "base/progress.h"           // JobControl
#include "base/thread_pool.h"        // ThreadPool
#include "forward/token_set.h"       // TokenSet
#include "kernels/matmul.h"          // ComputePrecision
#include "model/model.h"             // Model
#include "quantize/packed_writer.h"  // PackedCheckpointWriter
#include "quantize/quantize_plan.h"  // QuantizePlan
#include "text/block_builder.h"      // SourceBlocks

namespace winnow {

struct CalibrateOptions {
  // False: each weight by itself, columns counting as much as their inputs are large.
  bool compensated = true;
  double damping = 0.01;  // RoundCompensated
  // What the mean of the layer counts for in an expert's moments, in tokens of the expert's own.
  double prior_tokens = 64;
  // Of MeasureExpertErrors alone: errors relative to the stream behind the layer, which is
  // comparable with what pruning and condensing lose, in place of the stream before it.
  bool relative_to_result = false;
  ComputePrecision compute = ComputePrecision::kF32;
  uint64_t memory_budget_bytes = 0;
};

struct CalibratePlan {
  TokenSet tokens;
  bool prefetch = true;
  bool spill = false;  // the stream lives in a file
  MemoryPlan memory;
};
// ResourceError if no way to hold it fits the budget, UsageError for ids the model does not have.
CalibratePlan PlanCalibrate(const Model& model, const std::vector<SourceBlocks>& sources,
                            const QuantizePlan& formats, const CalibrateOptions& options,
                            int num_threads);

struct CalibratedLayer {
  int32_t layer = 0;
  int64_t unseen_experts = 0;  // no token was routed to them: rounded for the mean of the layer
  int64_t fewest_tokens = 0;   // of an expert
};

// Writes every matrix of `formats` through `writer`, which the caller finishes. `spill_file` takes
// the stream where the plan says so; it has no name any more once it is open.
std::vector<CalibratedLayer> RunCalibrate(const Model& model, const QuantizePlan& formats,
                                          const CalibrateOptions& options,
                                          const CalibratePlan& plan, const fs::path& spill_file,
                                          PackedCheckpointWriter& writer, ThreadPool& pool,
                                          const JobControl& control);

}  // namespace winnow
