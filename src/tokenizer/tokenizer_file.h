// tokenizer.json in one pass. The vocabulary and the merges (200,000 entries each) go into flat
// arrays without a JSON value per entry; the rest becomes an ordinary Json. As strict as
// ParseJson: depth, duplicate keys, UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"  // Json

namespace winnow::tok {

struct TokenizerFile {
  struct Text {
    uint32_t offset;
    uint32_t bytes;
  };
  struct VocabEntry {
    Text token;
    int32_t id;
  };

  std::string_view Get(Text text) const {
    return std::string_view(bytes).substr(text.offset, text.bytes);
  }

  Json rest;          // without model.vocab and model.merges where those were read into the arrays
  std::string bytes;  // what Text refers to
  bool has_vocab = false;
  bool has_merges = false;
  std::vector<VocabEntry> vocab;  // in the file's order; duplicates not yet refused
  std::vector<Text> merge_parts;  // left and right of each merge in order of rank
};

// Throws ModelError naming `where`.
TokenizerFile ParseTokenizerFile(std::string_view text, const std::string& where);

}  // namespace winnow::tok
