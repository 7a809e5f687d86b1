// The grammar of a safetensors header, without its layout: what each tensor says about itself. Used
// by ParseSafetensorsHeader only. Throws ModelError at the first token that does not belong.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/tensor_info.h"  // TensorInfo

namespace winnow {

struct SafetensorsMembers {
  // In header order, names not yet compared with each other. `file_offset` and `bytes` hold the two
  // data_offsets, begin and end, as written.
  std::vector<TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
};

SafetensorsMembers ParseSafetensorsMembers(std::string_view json, const std::string& where);

}  // namespace winnow
