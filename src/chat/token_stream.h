// The tokens of a template as the parsers of expressions and statements take them.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <vector>

#include "chat/lexer.h"    // Token
#include "chat/problem.h"  // Problem

namespace winnow::chat {

class TokenStream {
 public:
  explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& Peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  Token Take() {
    Token token = Peek();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  int line() const { return Peek().line; }
  bool Is(TokenKind kind, std::string_view text = {}, size_t ahead = 0) const {
    const Token& token = Peek(ahead);
    return token.kind == kind && (text.empty() || token.text == text);
  }
  bool IsName(std::string_view name) const { return Is(TokenKind::kName, name); }
  bool IsOperator(std::string_view op) const { return Is(TokenKind::kOperator, op); }
  bool SkipName(std::string_view name) { return Skip(TokenKind::kName, name); }
  bool SkipOperator(std::string_view op) { return Skip(TokenKind::kOperator, op); }

  std::string TakeName(std::string_view what) {
    if (!Is(TokenKind::kName)) Fail(fmt::format("expected {}", what));
    return Take().text;
  }
  void ExpectOperator(std::string_view op) {
    if (!SkipOperator(op)) Fail(fmt::format("expected \"{}\"", op));
  }
  void Expect(TokenKind kind, std::string_view what) {
    if (!Is(kind)) Fail(fmt::format("expected {}", what));
    Take();
  }
  // `expected ...`, and what is there instead.
  [[noreturn]] void Fail(const std::string& what) const {
    const Token& token = Peek();
    const bool has_text = !token.text.empty() && token.kind != TokenKind::kText;
    throw Problem(has_text ? fmt::format("{}, got \"{}\"", what, token.text.substr(0, 40))
                           : fmt::format("{}, got the end of a tag", what),
                  token.line);
  }

 private:
  bool Skip(TokenKind kind, std::string_view text) {
    if (!Is(kind, text)) return false;
    Take();
    return true;
  }
  std::vector<Token> tokens_;
  size_t at_ = 0;
};

}  // namespace winnow::chat
