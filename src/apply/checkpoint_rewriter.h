// `winnow apply`: streams a checkpoint into a smaller one. Experts are renumbered, router rows and
// fused tensors cut, config.json edited; layout, order, shards, dtype and every other file are
// carried through. Data is copied range by range (inside the kernel where possible) and never held.
// The output appears by rename; an interrupted run goes on with the same bytes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apply/weight_replacements.h"  // WeightReplacements
#include "base/dtype.h"                 // Dtype
#include "base/progress.h"              // JobControl
#include "model/model.h"                // Model
#include "plan/compression_plan.h"      // CompressionPlan

namespace winnow {

// How condensed layers are written.
enum class CondensedForm : uint8_t {
  kParts,  // shared expert and experts as they are, their fixed weights in config.json
  kFused,  // one dense SwiGLU, the weights folded into its down projection
  kStock,  // the same as a dense layer in the family's own words, filled up to their common width
};

struct ApplyOptions {
  CondensedForm condensed_form = CondensedForm::kParts;
  // Matrices that are written anew (null: none); must outlive the run.
  const WeightReplacements* replacements = nullptr;
  // Files with the refitted down projections of condensed layers, by decoder layer; they are
  // written fused. While planning, null stands for a file that is to come.
  std::map<int32_t, std::shared_ptr<const SafetensorsFile>> refitted_layers = {};
  // What the model card says of them; empty: that no weight was changed.
  std::string changes = {};
  std::optional<Dtype> dtype = {};  // convert every F32/F16/BF16 tensor
  bool resume = false;
  bool export_code = false;  // modelling code for transformers goes with it (export_code.h)
};

// A run of bytes of one source tensor, or of what replaces it.
struct SourceRange {
  const TensorInfo* tensor = nullptr;
  uint64_t offset = 0;
  uint64_t bytes = 0;  // in dtype()
  const WeightReplacements::Place* replacement = nullptr;
  uint64_t skip = 0;  // bytes of the replacement before the range

  Dtype dtype() const { return replacement != nullptr ? replacement->dtype : tensor->dtype; }
};

struct OutputTensor {
  TensorInfo info;  // as it will be
  Dtype source_dtype = Dtype::kF32;
  std::vector<SourceRange> ranges;  // in order; together the tensor's content
  // The content is built of a layer's weights and lies in the file of that layer
  // (condensed_layer.h) until it is written; there are no ranges then.
  int32_t built_layer = -1;
};

struct OutputShard {
  std::string file_name;
  std::string header;
  std::vector<OutputTensor> tensors;
  uint64_t bytes = 0;  // of the whole file
};

// Everything that will be written, decided before the first byte.
struct RewritePlan {
  std::vector<OutputShard> shards;
  std::string config_json;
  std::string index_json;  // empty: single file
  std::vector<fs::path> other_files;
  uint64_t bytes_before = 0;  // of the weight files
  uint64_t bytes_after = 0;
  int64_t experts_before = 0, experts_after = 0;  // over all layers
  std::vector<int32_t> condensed_layers;          // decoder indices
  // Of one condensed layer: what it becomes, and what it is built of.
  uint64_t largest_built_bytes = 0, largest_build_source_bytes = 0;
  int64_t stock_width = 0;  // of dense layers, with CondensedForm::kStock
};

// `changes` of the model card: healing, another number format, or nothing.
std::string CardChanges(const ApplyOptions& options);

RewritePlan PlanRewrite(const Model& model, const CompressionPlan& plan,
                        const ApplyOptions& options);

struct ApplyResult {
  uint64_t bytes_written = 0;
  double seconds = 0;  // of copying, audit not counted
  int64_t audited_tensors = 0;
};
// Throws ResourceError (disk), UsageError (resume of another run), ModelError if the audit of what
// was written finds a difference (the output is then not published).
ApplyResult ApplyPlan(const Model& model, const CompressionPlan& plan, const RewritePlan& rewrite,
                      const ApplyOptions& options, const fs::path& output,
                      const JobControl& control);

}  // namespace winnow
