// `winnow quantize` by rounding to nearest: every matrix by itself, no text needed. Rows of a
// matrix at a time are read, rounded and handed to the writer, so that memory holds one expert and
// one piece of work whatever the size of the model.
#pragma once

#include <cstdint>
#include <string>

#include "base/file.h"               // fs
#include "base/memory.h"             // MemoryPlan
#include "base/progress.h"           // JobControl
#include "base/thread_pool.h"        // ThreadPool
#include "model/model.h"             // Model
#include "quantize/packed_writer.h"  // PackedWriteResult
#include "quantize/quantize_plan.h"  // QuantizePlan

namespace winnow {

struct QuantizeEstimate {
  MemoryPlan memory;
  uint64_t bytes_before = 0;   // of all tensors
  uint64_t bytes_after = 0;    // likewise
  uint64_t bytes_to_read = 0;  // of what is rounded
  uint64_t weights = 0;        // that are rounded
};

// Checks the plan (CheckQuantizePlan) and says what it will take. UsageError if nothing is packed.
QuantizeEstimate EstimateQuantize(const Model& model, const QuantizePlan& plan);

// Writes `out` (packed_writer.h). The same bytes for any number of threads. ModelError for weights
// that are NaN or infinite.
PackedWriteResult RunQuantize(const Model& model, const QuantizePlan& plan, const fs::path& out,
                              ThreadPool& pool, const JobControl& control);

// What the model card and winnow-quantize.json say: sizes, formats by part, and `method`, how the
// weights were rounded, a sentence without its full stop.
std::string QuantizeCard(const Model& model, const QuantizePlan& plan, const std::string& method);
OrderedJson QuantizeRecord(const Model& model, const QuantizePlan& plan, const std::string& method);

}  // namespace winnow
