// The special tokens that a chat template knows by name.
#pragma once

#include <string>

#include "base/file.h"  // fs
#include "base/json.h"  // Json, OrderedJson

namespace winnow::chat {

// {"bos_token": "<s>", ...} from tokenizer_config.json (`config`, null if there is none), what it
// leaves out from special_tokens_map.json and the tokenizer's class. A token that is null is left
// out: undefined for the template, as in transformers. ModelError if one is neither a string nor an
// object with `content`; `where` names the config in messages.
OrderedJson SpecialTokens(const fs::path& model_folder, const Json& config,
                          const std::string& where);

}  // namespace winnow::chat
