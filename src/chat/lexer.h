// A template's text as tokens, with Jinja's control of whitespace as transformers sets it: the line
// break after a block tag goes (trim_blocks), and so do the blanks before one that begins its line
// (lstrip_blocks); `-` strips all whitespace on its side, `+` keeps it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace winnow::chat {

enum class TokenKind {
  kText,
  kPrintBegin,  // {{
  kPrintEnd,
  kBlockBegin,  // {%
  kBlockEnd,
  kName,
  kString,  // its value
  kInteger,
  kFloat,
  kOperator,
  kEnd
};

struct Token {
  TokenKind kind;
  std::string text;
  int line;
};

// Ends with a kEnd. `source` is valid UTF-8. Problem with its line for what is no token.
std::vector<Token> Tokenise(std::string_view source);

}  // namespace winnow::chat
