// The normalizer of a tokenizer.json: the steps text goes through before it is cut.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"  // Json
#include "tokenizer/regex.h"

namespace winnow::tok {

// Text on its way to the model.
struct Text {
  std::string bytes;
  // How many of its leading bytes stand for the first character of the whole input; 0 for text
  // from further on. Metaspace with prepend_scheme "first" asks for this.
  size_t origin_bytes = 0;
};

// Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, StripAccents, ByteLevel.
class Normalizer {
 public:
  Normalizer() = default;  // null: changes nothing
  // Throws ModelError naming `where` for anything else.
  static Normalizer FromJson(const Json& json, const std::string& where);

  bool empty() const { return steps_.empty(); }
  // ModelError if the text grows beyond any use (Replace steps that double it again and again).
  void Apply(Text& text, RegexScratch& scratch) const;

 private:
  using Step = std::function<void(Text&, RegexScratch&)>;

  void Add(const Json& json, const std::string& where);

  std::vector<Step> steps_;
};

}  // namespace winnow::tok
