// Expressions of the template language, with Jinja's precedence.
#pragma once

#include "chat/syntax.h"        // Expr
#include "chat/token_stream.h"  // TokenStream

namespace winnow::chat {

class ExpressionParser {
 public:
  explicit ExpressionParser(TokenStream& tokens) : tokens_(tokens) {}

  // Problem for what is no expression, is not supported, or is nested too deeply.
  ExprPtr Parse();
  // Without `x if y else z`: what stands before the `if` of a `for`.
  ExprPtr ParseWithoutConditional();
  // `a` or `a, b`: a tuple if there is a comma.
  ExprPtr ParseTuple(bool with_conditional = true);
  // `| name(...) | name(...)` behind `value`, which may be null in a filter block.
  ExprPtr ParseFilters(ExprPtr value);
  // `name | name` of {% filter name %}: the first without a bar.
  ExprPtr ParseFilterChain();

 private:
  ExprPtr ParseOr();
  ExprPtr ParseAnd();
  ExprPtr ParseNot();
  ExprPtr ParseCompare();
  ExprPtr ParseSum();
  ExprPtr ParseConcat();
  ExprPtr ParseProduct();
  ExprPtr ParsePower();
  ExprPtr ParseUnary(bool with_filters);
  ExprPtr ParsePrimary();
  ExprPtr ParseNumber();
  ExprPtr ParseStrings();
  ExprPtr ParseParentheses();
  ExprPtr ParseListLiteral();
  ExprPtr ParseDictLiteral();
  ExprPtr ParsePostfix(ExprPtr value);
  ExprPtr ParseSubscript(ExprPtr value);
  ExprPtr ParseCall(ExprPtr callee);
  ExprPtr ParseFilter(ExprPtr value);
  ExprPtr ParseTest(ExprPtr value);
  ExprPtr ParseBehind(ExprPtr value);
  void ParseArguments(Expr& call);
  ExprPtr New(ExprKind kind) const;
  // Sets the node's depth from its parts; Problem if it is too deep.
  ExprPtr Finish(ExprPtr node) const;

  TokenStream& tokens_;
  int nesting_ = 0;
};

}  // namespace winnow::chat
