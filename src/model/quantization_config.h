// `quantization_config` of config.json: which matrices of a checkpoint are packed, and how. The
// section is an extension of Winnow's (docs/FORMATS.md); those of other programs are refused by
// name.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"            // OrderedJson
#include "model/layer_formats.h"  // LayerFormats
#include "model/model_config.h"   // ModelConfig

namespace winnow {

// Fills in the formats of `out`, whose layers are complete. ModelError for another method or
// version, unknown keys and names, lists of the wrong length, and formats of what the model lacks.
void ReadQuantizationConfig(const OrderedJson& config, const std::string& where, ModelConfig& out);

// The config of a model stored in these formats; without any, the section is removed.
OrderedJson ConfigWithFormats(const OrderedJson& config, const std::vector<LayerFormats>& layers,
                              const PackedFormat& lm_head);

}  // namespace winnow
