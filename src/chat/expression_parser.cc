#include "chat/expression_parser.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "chat/filters.h"

namespace winnow::chat {
namespace {

// Bounds the recursion of this parser, of the interpreter and of the nodes' destruction.
constexpr int kMaxExpressionDepth = 200;
constexpr size_t kMaxArguments = 100;

// Functions that Jinja has and we do not.
constexpr std::string_view kRefusedFunctions[] = {"lipsum", "cycler", "joiner"};

class Nesting {
 public:
  Nesting(int& depth, int line) : depth_(depth) {
    if (++depth_ > kMaxExpressionDepth) {
      --depth_;
      throw Problem(fmt::format("an expression is nested deeper than {}", kMaxExpressionDepth),
                    line);
    }
  }
  ~Nesting() { --depth_; }
  Nesting(const Nesting&) = delete;
  Nesting& operator=(const Nesting&) = delete;

 private:
  int& depth_;
};

}  // namespace

ExprPtr ExpressionParser::New(ExprKind kind) const {
  auto node = std::make_unique<Expr>();
  node->kind = kind;
  node->line = tokens_.line();
  return node;
}

ExprPtr ExpressionParser::Finish(ExprPtr node) const {
  int deepest = 0;
  for (const ExprPtr& part : node->operands) {
    if (part != nullptr) deepest = std::max(deepest, part->depth);
  }
  for (const auto& [name, part] : node->named) deepest = std::max(deepest, part->depth);
  node->depth = deepest + 1;
  if (node->depth > kMaxExpressionDepth) {
    throw Problem(fmt::format("an expression is nested deeper than {}", kMaxExpressionDepth),
                  node->line);
  }
  return node;
}

ExprPtr ExpressionParser::Parse() {
  const Nesting nesting(nesting_, tokens_.line());
  ExprPtr value = ParseOr();
  while (tokens_.IsName("if")) {
    ExprPtr node = New(ExprKind::kConditional);
    tokens_.Take();
    node->operands.push_back(std::move(value));
    node->operands.push_back(ParseOr());
    node->operands.push_back(tokens_.SkipName("else") ? Parse() : nullptr);
    value = Finish(std::move(node));
  }
  return value;
}

ExprPtr ExpressionParser::ParseWithoutConditional() {
  const Nesting nesting(nesting_, tokens_.line());
  return ParseOr();
}

ExprPtr ExpressionParser::ParseTuple(bool with_conditional) {
  const auto part = [&] { return with_conditional ? Parse() : ParseWithoutConditional(); };
  const auto at_end = [&] {
    return tokens_.Is(TokenKind::kPrintEnd) || tokens_.Is(TokenKind::kBlockEnd) ||
           tokens_.IsOperator(")");
  };
  ExprPtr first = part();
  if (!tokens_.IsOperator(",")) return first;
  ExprPtr node = New(ExprKind::kTuple);
  node->operands.push_back(std::move(first));
  while (tokens_.SkipOperator(",") && !at_end()) node->operands.push_back(part());
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseOr() {
  ExprPtr first = ParseAnd();
  if (!tokens_.IsName("or")) return first;
  ExprPtr node = New(ExprKind::kOr);
  node->operands.push_back(std::move(first));
  while (tokens_.SkipName("or")) node->operands.push_back(ParseAnd());
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseAnd() {
  ExprPtr first = ParseNot();
  if (!tokens_.IsName("and")) return first;
  ExprPtr node = New(ExprKind::kAnd);
  node->operands.push_back(std::move(first));
  while (tokens_.SkipName("and")) node->operands.push_back(ParseNot());
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseNot() {
  if (!tokens_.IsName("not")) return ParseCompare();
  const Nesting nesting(nesting_, tokens_.line());
  ExprPtr node = New(ExprKind::kNot);
  tokens_.Take();
  node->operands.push_back(ParseNot());
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseCompare() {
  static constexpr std::pair<std::string_view, Operator> kOperators[] = {
      {"==", Operator::kEqual},     {"!=", Operator::kNotEqual}, {"<", Operator::kLess},
      {"<=", Operator::kLessEqual}, {">", Operator::kGreater},   {">=", Operator::kGreaterEqual}};
  const auto take_operator = [&]() -> std::optional<Operator> {
    for (const auto& [text, op] : kOperators) {
      if (tokens_.SkipOperator(text)) return op;
    }
    if (tokens_.SkipName("in")) return Operator::kIn;
    if (tokens_.IsName("not") && tokens_.Is(TokenKind::kName, "in", 1)) {
      tokens_.Take();
      tokens_.Take();
      return Operator::kNotIn;
    }
    return std::nullopt;
  };
  ExprPtr value = ParseSum();
  ExprPtr node;
  while (const std::optional<Operator> op = take_operator()) {
    if (node == nullptr) {
      node = New(ExprKind::kCompare);
      node->operands.push_back(std::move(value));
    }
    node->operators.push_back(*op);
    node->operands.push_back(ParseSum());
  }
  return node == nullptr ? std::move(value) : Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseSum() {
  ExprPtr value = ParseConcat();
  ExprPtr node;
  while (tokens_.IsOperator("+") || tokens_.IsOperator("-")) {
    if (node == nullptr) {
      node = New(ExprKind::kArithmetic);
      node->operands.push_back(std::move(value));
    }
    node->operators.push_back(tokens_.Take().text == "+" ? Operator::kAdd : Operator::kSubtract);
    node->operands.push_back(ParseConcat());
  }
  return node == nullptr ? std::move(value) : Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseConcat() {
  ExprPtr first = ParseProduct();
  if (!tokens_.IsOperator("~")) return first;
  ExprPtr node = New(ExprKind::kConcat);
  node->operands.push_back(std::move(first));
  while (tokens_.SkipOperator("~")) node->operands.push_back(ParseProduct());
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseProduct() {
  static constexpr std::pair<std::string_view, Operator> kOperators[] = {
      {"*", Operator::kMultiply},
      {"/", Operator::kDivide},
      {"//", Operator::kFloorDivide},
      {"%", Operator::kModulo}};
  ExprPtr value = ParsePower();
  ExprPtr node;
  for (;;) {
    const auto* found =
        std::find_if(std::begin(kOperators), std::end(kOperators),
                     [&](const auto& one) { return tokens_.IsOperator(one.first); });
    if (found == std::end(kOperators)) break;
    if (node == nullptr) {
      node = New(ExprKind::kArithmetic);
      node->operands.push_back(std::move(value));
    }
    tokens_.Take();
    node->operators.push_back(found->second);
    node->operands.push_back(ParsePower());
  }
  return node == nullptr ? std::move(value) : Finish(std::move(node));
}

// From left to right, as Jinja has it (and Python has not).
ExprPtr ExpressionParser::ParsePower() {
  ExprPtr value = ParseUnary(true);
  if (!tokens_.IsOperator("**")) return value;
  ExprPtr node = New(ExprKind::kArithmetic);
  node->operands.push_back(std::move(value));
  while (tokens_.SkipOperator("**")) {
    node->operators.push_back(Operator::kPower);
    node->operands.push_back(ParseUnary(true));
  }
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseUnary(bool with_filters) {
  const Nesting nesting(nesting_, tokens_.line());
  ExprPtr value;
  if (tokens_.IsOperator("-") || tokens_.IsOperator("+")) {
    value = New(tokens_.IsOperator("-") ? ExprKind::kNegate : ExprKind::kPlus);
    tokens_.Take();
    value->operands.push_back(ParseUnary(false));
    value = Finish(std::move(value));
  } else {
    value = ParsePrimary();
  }
  value = ParsePostfix(std::move(value));
  return with_filters ? ParseBehind(std::move(value)) : std::move(value);
}

ExprPtr ExpressionParser::ParseNumber() {
  ExprPtr node = New(ExprKind::kConstant);
  const Token token = tokens_.Take();
  const char* end = token.text.data() + token.text.size();
  std::from_chars_result read{};
  if (token.kind == TokenKind::kInteger) {
    int64_t value = 0;
    read = std::from_chars(token.text.data(), end, value);
    node->constant = Value::Integer(value);
  } else {
    double value = 0;
    read = std::from_chars(token.text.data(), end, value);
    node->constant = Value::Float(value);
  }
  if (read.ec != std::errc() || read.ptr != end) {
    throw Problem(fmt::format("the number {} does not fit 64 bits", token.text.substr(0, 40)),
                  token.line);
  }
  return node;
}

// Neighbouring strings are one.
ExprPtr ExpressionParser::ParseStrings() {
  ExprPtr node = New(ExprKind::kConstant);
  std::string text;
  while (tokens_.Is(TokenKind::kString)) text += tokens_.Take().text;
  node->constant = Value::String(std::move(text));
  return node;
}

ExprPtr ExpressionParser::ParsePrimary() {
  if (tokens_.Is(TokenKind::kInteger) || tokens_.Is(TokenKind::kFloat)) return ParseNumber();
  if (tokens_.Is(TokenKind::kString)) return ParseStrings();
  if (tokens_.IsOperator("(")) return ParseParentheses();
  if (tokens_.IsOperator("[")) return ParseListLiteral();
  if (tokens_.IsOperator("{")) return ParseDictLiteral();
  if (!tokens_.Is(TokenKind::kName)) tokens_.Fail("expected a value");
  ExprPtr node = New(ExprKind::kConstant);
  const std::string name = tokens_.Take().text;
  if (name == "true" || name == "True") {
    node->constant = Value::Bool(true);
  } else if (name == "false" || name == "False") {
    node->constant = Value::Bool(false);
  } else if (name == "none" || name == "None") {
    node->constant = Value::None();
  } else {
    node->kind = ExprKind::kName;
    node->name = name;
  }
  return node;
}

ExprPtr ExpressionParser::ParseParentheses() {
  ExprPtr empty = New(ExprKind::kTuple);
  tokens_.Take();
  if (tokens_.SkipOperator(")")) return empty;
  ExprPtr value = ParseTuple();
  tokens_.ExpectOperator(")");
  return value;
}

ExprPtr ExpressionParser::ParseListLiteral() {
  ExprPtr node = New(ExprKind::kList);
  tokens_.Take();
  while (!tokens_.IsOperator("]")) {
    node->operands.push_back(Parse());
    if (!tokens_.SkipOperator(",")) break;
  }
  tokens_.ExpectOperator("]");
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseDictLiteral() {
  ExprPtr node = New(ExprKind::kDict);
  tokens_.Take();
  while (!tokens_.IsOperator("}")) {
    node->operands.push_back(Parse());
    tokens_.ExpectOperator(":");
    node->operands.push_back(Parse());
    if (!tokens_.SkipOperator(",")) break;
  }
  tokens_.ExpectOperator("}");
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParsePostfix(ExprPtr value) {
  for (;;) {
    if (tokens_.IsOperator(".")) {
      tokens_.Take();
      const bool is_position = tokens_.Is(TokenKind::kInteger);
      ExprPtr node = New(is_position ? ExprKind::kSubscript : ExprKind::kAttribute);
      node->operands.push_back(std::move(value));
      if (is_position) {
        node->operands.push_back(ParseNumber());
      } else {
        node->name = tokens_.TakeName("a name after the dot");
      }
      value = Finish(std::move(node));
    } else if (tokens_.IsOperator("[")) {
      value = ParseSubscript(std::move(value));
    } else if (tokens_.IsOperator("(")) {
      value = ParseCall(std::move(value));
    } else {
      return value;
    }
  }
}

ExprPtr ExpressionParser::ParseSubscript(ExprPtr value) {
  ExprPtr node = New(ExprKind::kSubscript);
  tokens_.Take();
  node->operands.push_back(std::move(value));
  const auto part = [&]() -> ExprPtr {
    return tokens_.IsOperator(":") || tokens_.IsOperator("]") ? nullptr : Parse();
  };
  node->operands.push_back(part());
  if (tokens_.IsOperator(":")) {
    node->kind = ExprKind::kSlice;
    for (int i = 0; i < 2; ++i) {
      node->operands.push_back(tokens_.SkipOperator(":") ? part() : nullptr);
    }
  } else if (node->operands.back() == nullptr) {
    tokens_.Fail("expected a key");
  }
  if (tokens_.IsOperator(",")) tokens_.Fail("several keys in one subscript are not supported");
  tokens_.ExpectOperator("]");
  return Finish(std::move(node));
}

void ExpressionParser::ParseArguments(Expr& call) {
  tokens_.ExpectOperator("(");
  while (!tokens_.IsOperator(")")) {
    if (tokens_.IsOperator("*") || tokens_.IsOperator("**")) {
      tokens_.Fail("unpacked arguments (*, **) are not supported");
    }
    if (tokens_.Is(TokenKind::kName) && tokens_.Is(TokenKind::kOperator, "=", 1)) {
      const std::string name = tokens_.Take().text;
      tokens_.Take();
      call.named.emplace_back(name, Parse());
    } else {
      if (!call.named.empty()) tokens_.Fail("arguments without a name come first");
      call.operands.push_back(Parse());
    }
    if (call.operands.size() + call.named.size() > kMaxArguments) {
      throw Problem(fmt::format("a call has more than {} arguments", kMaxArguments), call.line);
    }
    if (!tokens_.SkipOperator(",")) break;
  }
  tokens_.ExpectOperator(")");
}

ExprPtr ExpressionParser::ParseCall(ExprPtr callee) {
  ExprPtr node = New(ExprKind::kCall);
  if (callee->kind == ExprKind::kName &&
      std::find(std::begin(kRefusedFunctions), std::end(kRefusedFunctions), callee->name) !=
          std::end(kRefusedFunctions)) {
    throw Problem(fmt::format("function \"{}\" is not supported", callee->name), callee->line);
  }
  node->operands.push_back(std::move(callee));
  ParseArguments(*node);
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseBehind(ExprPtr value) {
  for (;;) {
    if (tokens_.IsOperator("|")) {
      tokens_.Take();
      value = ParseFilter(std::move(value));
    } else if (tokens_.IsName("is")) {
      value = ParseTest(std::move(value));
    } else if (tokens_.IsOperator("(")) {
      value = ParseCall(std::move(value));
    } else {
      return value;
    }
  }
}

ExprPtr ExpressionParser::ParseFilter(ExprPtr value) {
  ExprPtr node = New(ExprKind::kFilter);
  node->name = tokens_.TakeName("the name of a filter");
  while (tokens_.SkipOperator(".")) node->name += "." + tokens_.TakeName("the name of a filter");
  if (!IsFilter(node->name)) {
    throw Problem(fmt::format("filter \"{}\" is not supported", node->name), node->line);
  }
  node->operands.push_back(std::move(value));
  if (tokens_.IsOperator("(")) ParseArguments(*node);
  return Finish(std::move(node));
}

ExprPtr ExpressionParser::ParseFilters(ExprPtr value) {
  while (tokens_.SkipOperator("|")) value = ParseFilter(std::move(value));
  return value;
}

ExprPtr ExpressionParser::ParseFilterChain() {
  return ParseFilters(ParseFilter(nullptr));
}

ExprPtr ExpressionParser::ParseTest(ExprPtr value) {
  ExprPtr node = New(ExprKind::kTest);
  tokens_.Take();
  const bool is_negated = tokens_.SkipName("not");
  node->name = tokens_.TakeName("the name of a test");
  if (!IsTest(node->name)) {
    throw Problem(fmt::format("test \"{}\" is not supported", node->name), node->line);
  }
  node->operands.push_back(std::move(value));
  const bool is_word = tokens_.Is(TokenKind::kName) && !tokens_.IsName("else") &&
                       !tokens_.IsName("or") && !tokens_.IsName("and");
  if (tokens_.IsOperator("(")) {
    ParseArguments(*node);
  } else if (is_word || tokens_.Is(TokenKind::kString) || tokens_.Is(TokenKind::kInteger) ||
             tokens_.Is(TokenKind::kFloat) || tokens_.IsOperator("[") || tokens_.IsOperator("{")) {
    if (tokens_.IsName("is")) tokens_.Fail("tests cannot follow each other");
    node->operands.push_back(ParsePostfix(ParsePrimary()));
  }
  node = Finish(std::move(node));
  if (!is_negated) return node;
  ExprPtr negated = New(ExprKind::kNot);
  negated->operands.push_back(std::move(node));
  return Finish(std::move(negated));
}

}  // namespace winnow::chat
