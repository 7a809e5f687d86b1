// The tensors a condensed layer is stored as: decided before anything is written, then built from
// the layer's weights, one layer in memory at a time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "apply/checkpoint_rewriter.h"    // ApplyOptions, CondensedForm
#include "checkpoint/safetensors_file.h"  // SafetensorsFile
#include "model/model.h"                  // Model
#include "plan/compression_plan.h"        // CompressionPlan

namespace winnow {

// Whether single neurons or a refit need the fused form, whatever was asked for.
CondensedForm FormOf(const LayerPlan& layer, CondensedForm asked, bool refitted);
// The width of all condensed layers of a plan in the family's own form. UsageError where it has
// none.
int64_t StockWidth(const Model& model, const CompressionPlan& plan);
// Name, dtype and shape of what takes the place of the layer's router and experts. `stock_width` is
// of CondensedForm::kStock.
std::vector<TensorInfo> CondensedTensors(const Model& model, const LayerPlan& layer,
                                         CondensedForm form, std::optional<Dtype> dtype,
                                         int64_t stock_width);
// Tensors of the source that the fused form takes in: the shared expert's, if it has no gate.
std::vector<std::string> AbsorbedTensors(const Model& model, const LayerPlan& layer,
                                         CondensedForm form);
// What config.json says of it.
CondensedLayer CondensedConfig(const Model& model, const LayerPlan& layer, CondensedForm form);

// Builds the tensors into `path`, by rename. `refitted_down` replaces the fused down projection,
// which is of the source's dtype (null: as the plan says).
void BuildCondensedLayer(const Model& model, const LayerPlan& layer, CondensedForm form,
                         std::optional<Dtype> dtype, int64_t stock_width,
                         const SafetensorsFile* refitted_down, const fs::path& path);
// The tensor of a file with a refitted layer.
inline constexpr const char* kRefittedDown = "condensed.down";
fs::path CondensedLayerPath(const fs::path& folder, int32_t layer);

}  // namespace winnow
