#include "apply/export_code.h"

#include <string>

namespace winnow {
namespace {

// Newer libraries take the weights' file name from this key. Without trust_remote_code they stop
// because there is no such file; they would fill a condensed layer with random numbers.
constexpr const char* kWeightsFileKey = "transformers_weights";
constexpr const char* kNoSuchFile = "load-this-folder-with-trust_remote_code=True.safetensors";

bool Has(const OrderedJson& config, const char* key) {
  const auto it = config.find(key);
  return it != config.end() && !it->is_null();
}

}  // namespace

OrderedJson ConfigWithModelingCode(const OrderedJson& config) {
  OrderedJson edited = config;
  OrderedJson map = OrderedJson::object();
  if (const auto it = config.find("auto_map"); it != config.end() && it->is_object()) {
    for (const auto& [key, value] : it->items()) {
      // Classes of the model's earlier code do not fit; a tokenizer's still does.
      if (key != "AutoConfig" && !key.starts_with("AutoModel")) map[key] = value;
    }
  }
  map["AutoConfig"] = "modeling_winnow.WinnowConfig";
  map["AutoModelForCausalLM"] = "modeling_winnow.WinnowForCausalLM";
  edited["auto_map"] = map;
  if (Has(config, "condensed_layers") || Has(config, "num_experts_per_layer")) {
    edited["architectures"] = OrderedJson::array({"WinnowForCausalLM"});
    edited[kWeightsFileKey] = kNoSuchFile;
  }
  return edited;
}

}  // namespace winnow
