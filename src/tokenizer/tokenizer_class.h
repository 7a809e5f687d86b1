// What a `tokenizer_class` of tokenizer_config.json implies beyond that file's fields.
#pragma once

#include <string_view>

namespace winnow::tok {

// Classes of transformers (4.57) that build the template of special tokens from
// tokenizer_config.json when they are loaded, whatever tokenizer.json says; and their defaults for
// what that file leaves out.
struct RebuildingClass {
  std::string_view name;
  bool adds_bos;
  const char* bos_token;
  const char* eos_token;
};

// By the class's name, with or without "Fast"; null for all other classes.
const RebuildingClass* FindRebuildingClass(std::string_view name);

}  // namespace winnow::tok
