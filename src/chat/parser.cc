#include "chat/parser.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "chat/expression_parser.h"
#include "chat/token_stream.h"

namespace winnow::chat {
namespace {

constexpr int kMaxBlockDepth = 60;

using Ends = std::initializer_list<std::string_view>;

std::string Join(const Ends& names) {
  std::string text;
  for (const std::string_view name : names) {
    text += text.empty() ? "" : " or ";
    text += name;
  }
  return text;
}

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(Tokenise(source)), expressions_(tokens_) {}

  Block Run() { return ParseBlock({}, ""); }

 private:
  // Statements up to one of the tags `ends`, whose opening is taken, but not its name.
  Block ParseBlock(const Ends& ends, std::string_view of) {
    const int line = tokens_.line();
    if (++depth_ > kMaxBlockDepth) {
      throw Problem(fmt::format("blocks are nested deeper than {}", kMaxBlockDepth), line);
    }
    Block block;
    for (;;) {
      if (tokens_.Is(TokenKind::kEnd)) {
        if (ends.size() > 0) throw Problem(fmt::format("{} has no {}", of, Join(ends)), line);
        break;
      }
      if (tokens_.Is(TokenKind::kText)) {
        block.push_back(New(StatementKind::kText));
        block.back()->text = tokens_.Take().text;
      } else if (tokens_.Is(TokenKind::kPrintBegin)) {
        tokens_.Take();
        block.push_back(New(StatementKind::kPrint));
        block.back()->value = expressions_.ParseTuple();
        tokens_.Expect(TokenKind::kPrintEnd, "}}");
      } else {
        tokens_.Take();
        const bool is_end = std::any_of(ends.begin(), ends.end(),
                                        [&](std::string_view end) { return tokens_.IsName(end); });
        if (is_end) break;
        block.push_back(ParseStatement());
      }
    }
    --depth_;
    return block;
  }

  std::unique_ptr<Statement> New(StatementKind kind) const {
    auto statement = std::make_unique<Statement>();
    statement->kind = kind;
    statement->line = tokens_.line();
    return statement;
  }
  void EndTag() { tokens_.Expect(TokenKind::kBlockEnd, "%}"); }
  // The body up to {% end %}, and that tag.
  Block ParseBody(std::string_view of, std::string_view end) {
    EndTag();
    Block body = ParseBlock({end}, of);
    tokens_.Take();
    EndTag();
    return body;
  }

  std::unique_ptr<Statement> ParseStatement() {
    const int line = tokens_.line();
    const std::string name = tokens_.TakeName("the name of a statement");
    if (name == "if") return ParseIf();
    if (name == "for") return ParseFor();
    if (name == "set") return ParseSet();
    if (name == "macro") return ParseMacro();
    if (name == "with") return ParseWith();
    if (name == "filter") {
      auto statement = New(StatementKind::kFilterBlock);
      statement->value = expressions_.ParseFilterChain();
      statement->body = ParseCaptured(name, "endfilter");
      return statement;
    }
    if (name == "generation") {
      auto statement = New(StatementKind::kGeneration);
      ++scopes_;
      statement->body = ParseBody(name, "endgeneration");
      --scopes_;
      return statement;
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) throw Problem(fmt::format("{} outside of a loop", name), line);
      auto statement = New(name == "break" ? StatementKind::kBreak : StatementKind::kContinue);
      EndTag();
      return statement;
    }
    const bool is_end = name.starts_with("end") || name == "else" || name == "elif";
    throw Problem(is_end ? fmt::format("unexpected {}", name)
                         : fmt::format("statement \"{}\" is not supported", name),
                  line);
  }

  std::unique_ptr<Statement> ParseIf() {
    auto statement = New(StatementKind::kIf);
    for (;;) {
      Branch branch;
      branch.condition = expressions_.ParseTuple();
      EndTag();
      branch.body = ParseBlock({"elif", "else", "endif"}, "if");
      statement->branches.push_back(std::move(branch));
      if (tokens_.SkipName("elif")) continue;
      if (tokens_.SkipName("else")) {
        EndTag();
        statement->otherwise = ParseBlock({"endif"}, "if");
      }
      tokens_.Take();  // endif
      EndTag();
      return statement;
    }
  }

  std::unique_ptr<Statement> ParseFor() {
    auto statement = New(StatementKind::kFor);
    statement->target = ParseTarget("in");
    if (!tokens_.SkipName("in")) tokens_.Fail("expected \"in\"");
    statement->value = expressions_.ParseTuple(/*with_conditional=*/false);
    if (tokens_.SkipName("if")) statement->condition = expressions_.Parse();
    if (tokens_.IsName("recursive")) {
      throw Problem("\"recursive\" loops are not supported", tokens_.line());
    }
    EndTag();
    ++loops_;
    ++scopes_;
    statement->body = ParseBlock({"else", "endfor"}, "for");
    --scopes_;
    --loops_;
    if (tokens_.SkipName("else")) {
      EndTag();
      statement->otherwise = ParseBlock({"endfor"}, "for");
    }
    tokens_.Take();  // endfor
    EndTag();
    return statement;
  }

  // `a`, `a, b`, `(a, b)` or `space.attribute`, up to the name or operator `end`.
  Target ParseTarget(std::string_view end) {
    const auto at_end = [&] {
      return tokens_.IsName(end) || tokens_.IsOperator(end) || tokens_.Is(TokenKind::kBlockEnd) ||
             tokens_.IsOperator("|");
    };
    Target target;
    const bool has_parenthesis = tokens_.SkipOperator("(");
    for (;;) {
      if (tokens_.IsOperator("(")) tokens_.Fail("nested targets are not supported");
      target.names.push_back(tokens_.TakeName("the name of a variable"));
      if (target.names.size() == 1 && tokens_.SkipOperator(".")) {
        target.attribute = tokens_.TakeName("the name of an attribute");
        break;
      }
      if (!tokens_.SkipOperator(",")) break;
      target.is_tuple = true;
      if (at_end()) break;
    }
    if (has_parenthesis) tokens_.ExpectOperator(")");
    return target;
  }

  std::unique_ptr<Statement> ParseSet() {
    auto statement = New(StatementKind::kSet);
    statement->target = ParseTarget("=");
    if (tokens_.SkipOperator("=")) {
      statement->value = expressions_.ParseTuple();
      EndTag();
      return statement;
    }
    statement->kind = StatementKind::kSetBlock;
    if (statement->target.is_tuple) tokens_.Fail("expected \"=\"");
    statement->value = expressions_.ParseFilters(nullptr);
    statement->body = ParseCaptured("set", "endset");
    return statement;
  }

  // A body whose text is not written but kept: loops outside of it cannot be left from within.
  Block ParseCaptured(std::string_view of, std::string_view end) {
    const int loops = std::exchange(loops_, 0);
    ++scopes_;
    Block body = ParseBody(of, end);
    --scopes_;
    loops_ = loops;
    return body;
  }

  std::unique_ptr<Statement> ParseMacro() {
    auto statement = New(StatementKind::kMacro);
    statement->text = tokens_.TakeName("the name of a macro");
    if (scopes_ > 0) {  // its names would have to outlive the block
      throw Problem(
          fmt::format("macro \"{}\" inside another block is not supported", statement->text),
          statement->line);
    }
    tokens_.ExpectOperator("(");
    while (!tokens_.IsOperator(")")) {
      Parameter parameter{tokens_.TakeName("the name of a parameter"), nullptr};
      if (tokens_.SkipOperator("=")) parameter.value = expressions_.Parse();
      statement->parameters.push_back(std::move(parameter));
      if (!tokens_.SkipOperator(",")) break;
    }
    tokens_.ExpectOperator(")");
    statement->body = ParseCaptured("macro", "endmacro");
    return statement;
  }

  std::unique_ptr<Statement> ParseWith() {
    auto statement = New(StatementKind::kWith);
    while (!tokens_.Is(TokenKind::kBlockEnd)) {
      Parameter variable{tokens_.TakeName("the name of a variable"), nullptr};
      tokens_.ExpectOperator("=");
      variable.value = expressions_.Parse();
      statement->parameters.push_back(std::move(variable));
      if (!tokens_.SkipOperator(",")) break;
    }
    ++scopes_;
    statement->body = ParseBody("with", "endwith");
    --scopes_;
    return statement;
  }

  TokenStream tokens_;
  ExpressionParser expressions_;
  int depth_ = 0;
  int loops_ = 0;   // that a break here could leave
  int scopes_ = 0;  // blocks with names of their own
};

}  // namespace

Block ParseTemplate(std::string_view source) {
  return Parser(source).Run();
}

}  // namespace winnow::chat
