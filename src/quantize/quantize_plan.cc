#include "quantize/quantize_plan.h"

#include <fmt/format.h>

#include "base/error.h"
#include "quantize/packed_layout.h"

namespace winnow {
namespace {

// One of the sets of matrices that share a format, as the plan and the model have it.
void CheckPart(const PackedFormat& format, const TensorSlice& slice, const std::string& what) {
  if (format.empty()) return;
  if (PackedFormatFromName(PackedFormatName(format)) != format) {
    throw UsageError(fmt::format("{}: {} columns of {} bits are no packed format", what,
                                 format.group_columns, format.bits));
  }
  if (!slice.exists()) {
    throw UsageError(fmt::format("the model has no {} to pack", what),
                     "the plan is of another model");
  }
  if (!slice.packed.empty()) {
    throw UsageError(
        fmt::format("{} is packed already, as {}", what, PackedFormatName(slice.packed)),
        "quantise the original model: rounding twice adds both errors");
  }
}

PackedFormat Stored(const PackedFormat& planned, const TensorSlice& slice) {
  return planned.empty() ? slice.packed : planned;
}

}  // namespace

PackedFormat BestFormat(int bits, int64_t group_columns) {
  return {.bits = bits,
          .group_columns = group_columns,
          .grid = bits <= 4 ? PackedGrid::kCurved : PackedGrid::kShifted};
}

QuantizePlan UniformQuantizePlan(const Model& model, const PackedFormat& experts,
                                 const PackedFormat& rest) {
  QuantizePlan plan;
  for (const LayerSlices& layer : model.layers()) {
    LayerFormats formats;
    formats.experts.assign(layer.experts.size(), experts);
    formats.attention = rest;
    if (layer.shared.gate.exists()) formats.shared = rest;
    if (layer.dense.gate.exists()) formats.dense = rest;
    plan.layers.push_back(std::move(formats));
  }
  if (!model.config().tie_word_embeddings) plan.lm_head = rest;
  return plan;
}

void CheckQuantizePlan(const Model& model, const QuantizePlan& plan) {
  if (plan.layers.size() != model.layers().size()) {
    throw UsageError(fmt::format("the plan has {} layers, the model {}", plan.layers.size(),
                                 model.layers().size()),
                     "the plan is of another model");
  }
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerFormats& formats = plan.layers[l];
    const LayerSlices& layer = model.layers()[l];
    if (!formats.experts.empty() && formats.experts.size() != layer.experts.size()) {
      throw UsageError(fmt::format("layer {}: the plan has formats for {} experts, the model has "
                                   "{}",
                                   l, formats.experts.size(), layer.experts.size()),
                       "the plan is of another model");
    }
    for (size_t e = 0; e < formats.experts.size(); ++e) {
      CheckPart(formats.experts[e], layer.experts[e].gate,
                fmt::format("layer {}, expert {}", l, e));
    }
    CheckPart(formats.attention, layer.q, fmt::format("layer {}, attention", l));
    CheckPart(formats.shared, layer.shared.gate, fmt::format("layer {}, shared expert", l));
    CheckPart(formats.dense, layer.dense.gate, fmt::format("layer {}, dense", l));
  }
  if (!plan.lm_head.empty() && model.config().tie_word_embeddings) {
    throw UsageError("lm_head is the embedding in this model, which stays as it is",
                     "leave lm_head out of the plan");
  }
  CheckPart(plan.lm_head, model.lm_head(), "lm_head");
}

QuantizePlan StoredFormats(const Model& model, const QuantizePlan& plan) {
  QuantizePlan stored = plan;
  for (size_t l = 0; l < stored.layers.size(); ++l) {
    LayerFormats& formats = stored.layers[l];
    const LayerSlices& layer = model.layers()[l];
    formats.experts.resize(layer.experts.size());
    for (size_t e = 0; e < layer.experts.size(); ++e) {
      formats.experts[e] = Stored(formats.experts[e], layer.experts[e].gate);
    }
    formats.attention = Stored(formats.attention, layer.q);
    formats.shared = Stored(formats.shared, layer.shared.gate);
    formats.dense = Stored(formats.dense, layer.dense.gate);
  }
  if (!model.config().tie_word_embeddings) stored.lm_head = Stored(plan.lm_head, model.lm_head());
  return stored;
}

uint64_t QuantizedBytes(const Model& model, const QuantizePlan& plan) {
  uint64_t total = 0;
  for (const PackedShard& shard : LayOutPacked(model, plan)) {
    for (const PackedTensor& tensor : shard.tensors) total += tensor.info.bytes;
  }
  return total;
}

uint64_t QuantizedFileBytes(const Model& model, const QuantizePlan& plan) {
  uint64_t total = 0;
  for (const PackedShard& shard : LayOutPacked(model, plan)) total += shard.bytes;
  return total;
}

}  // namespace winnow
