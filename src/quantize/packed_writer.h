// Writes the checkpoint a quantiser makes, a matrix at a time in any order: the layout is fixed
// before the first byte, so that no more is held than what is handed over. Each expert that is
// packed is one tensor, an extent of gate, up and down that is read in one go (docs/FORMATS.md).
// All else is copied. Writes OUT.partial and renames it at the end; a writer that is destroyed
// before Finish removes what it has written. Calls may come from one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/file.h"               // fs
#include "base/json.h"               // OrderedJson
#include "base/progress.h"           // JobControl
#include "model/model.h"             // Model
#include "quantize/quantize_plan.h"  // QuantizePlan

namespace winnow {

// The matrices a layer has once (kLmHead: the model).
enum class PackedMatrix : uint8_t {
  kQ,
  kK,
  kV,
  kO,
  kSharedGate,
  kSharedUp,
  kSharedDown,
  kDenseGate,
  kDenseUp,
  kDenseDown,
  kLmHead,
};

struct PackedWriteResult {
  uint64_t bytes_written = 0;  // of the weight files
  int64_t audited_tensors = 0;
};

class PackedCheckpointWriter {
 public:
  using Matrix = PackedMatrix;

  // `model` must outlive the writer. UsageError if the plan does not fit the model, ResourceError
  // if the disk has no room. What was left of an earlier run in OUT.partial is removed.
  PackedCheckpointWriter(const Model& model, QuantizePlan plan, const fs::path& out);
  ~PackedCheckpointWriter();
  PackedCheckpointWriter(const PackedCheckpointWriter&) = delete;
  PackedCheckpointWriter& operator=(const PackedCheckpointWriter&) = delete;

  // The matrices of one expert, each PackedBytes of its format and shape. RuntimeError if they are
  // not, or if the plan keeps that expert as it is.
  void WriteExpert(int64_t layer, int64_t expert, std::span<const std::byte> gate,
                   std::span<const std::byte> up, std::span<const std::byte> down);
  // `layer` is ignored for kLmHead.
  void WriteMatrix(int64_t layer, Matrix matrix, std::span<const std::byte> bytes);
  // The same a part at a time, for matrices that are not to be held: whole blocks of kPackedRows
  // rows from `first_row` on, ascending without gaps.
  void WriteRows(int64_t layer, Matrix matrix, int64_t first_row, std::span<const std::byte> bytes);

  // Copies every other tensor and file, writes config.json, the model card (`card`, Markdown below
  // its title: what was done) and winnow-quantize.json (`record`), opens the result as a model,
  // compares it with what was written, and puts it where OUT is. RuntimeError if a matrix of the
  // plan was never written.
  PackedWriteResult Finish(const std::string& card, const OrderedJson& record,
                           const JobControl& control);

  // Of all weight files, headers included.
  uint64_t total_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The slice that a matrix of the plan is made from, and its format in the plan.
const TensorSlice& SliceOf(const Model& model, int64_t layer, PackedMatrix matrix);
const PackedFormat& FormatOf(const QuantizePlan& plan, int64_t layer, PackedMatrix matrix);

}  // namespace winnow
