#include "tokenizer/tokenizer_class.h"

#include <algorithm>
#include <iterator>

namespace winnow::tok {
namespace {

constexpr RebuildingClass kRebuildingClasses[] = {
    {"LlamaTokenizer", true, "<s>", "</s>"},
    {"CodeLlamaTokenizer", true, "<s>", "</s>"},
    {"GPTNeoXTokenizer", false, "<|endoftext|>", "<|endoftext|>"},
};

}  // namespace

const RebuildingClass* FindRebuildingClass(std::string_view name) {
  if (name.ends_with("Fast")) name.remove_suffix(4);
  const auto* found = std::find_if(std::begin(kRebuildingClasses), std::end(kRebuildingClasses),
                                   [&](const RebuildingClass& c) { return c.name == name; });
  return found == std::end(kRebuildingClasses) ? nullptr : found;
}

}  // namespace winnow::tok
