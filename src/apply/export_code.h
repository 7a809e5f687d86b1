// Modelling code that goes with a checkpoint which no library class expresses, so that transformers
// loads it with trust_remote_code=True.
#pragma once

#include <string_view>

#include "base/json.h"  // OrderedJson

namespace winnow {

inline constexpr std::string_view kModelingFileName = "modeling_winnow.py";

// The text of modeling_winnow.py; it is the same for every checkpoint.
std::string_view ModelingCode();

// The config that makes AutoConfig and AutoModelForCausalLM take the classes of that file. Where
// the library's own class would need other weights (condensed or uneven layers), that class is kept
// from loading the folder. model_type stays: Winnow and the exported code read it.
OrderedJson ConfigWithModelingCode(const OrderedJson& config);

}  // namespace winnow
