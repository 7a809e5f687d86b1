// The post-processor of a tokenizer.json for single texts: the special tokens around them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"  // Json

namespace winnow::tok {

struct PostProcessor {
  std::vector<int32_t> prefix;
  std::vector<int32_t> suffix;

  // TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel (which only moves offsets),
  // and a Sequence with at most one of those that add tokens. Throws ModelError naming `where` for
  // anything else and for an id that `has_id` does not know.
  static PostProcessor FromJson(const Json& json, const std::function<bool(int32_t)>& has_id,
                                const std::string& where);
};

}  // namespace winnow::tok
