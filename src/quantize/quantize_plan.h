// Which packed format every matrix of a model gets: decided before anything is written, by a flag
// (UniformQuantizePlan) or by a search under a byte budget. Router, norms, biases, the shared
// expert's gate and the embedding are never packed: they are small or decide where tokens go.
#pragma once

#include <cstdint>
#include <vector>

#include "base/packed_format.h"   // PackedFormat
#include "model/layer_formats.h"  // LayerFormats
#include "model/model.h"          // Model

namespace winnow {

// An empty format keeps a matrix as the model stores it (which may be packed already).
struct QuantizePlan {
  std::vector<LayerFormats> layers;  // [num_layers]
  PackedFormat lm_head;
};

// The grid of these bits that loses least on weights (docs/METHODS.md): curved as far as there are
// tables, shifted above.
PackedFormat BestFormat(int bits, int64_t group_columns = 32);

// All experts in one format, everything else that can be packed in another: attention, shared
// expert, dense layers, and lm_head where it is not the embedding.
QuantizePlan UniformQuantizePlan(const Model& model, const PackedFormat& experts,
                                 const PackedFormat& rest);

// Throws UsageError if the plan does not fit the model: other layers or experts, a format for what
// the layer lacks, a tied lm_head, a matrix that is packed already, or nothing to pack at all.
void CheckQuantizePlan(const Model& model, const QuantizePlan& plan);

// What the new checkpoint is stored in: the plan's formats, and the model's own where it keeps
// them. Layers without experts have no formats of experts.
QuantizePlan StoredFormats(const Model& model, const QuantizePlan& plan);

// Bytes of all tensors of the new checkpoint, without headers; and of its weight files.
uint64_t QuantizedBytes(const Model& model, const QuantizePlan& plan);
uint64_t QuantizedFileBytes(const Model& model, const QuantizePlan& plan);

}  // namespace winnow
