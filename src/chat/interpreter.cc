#include "chat/interpreter.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <unordered_map>

#include "chat/filters.h"
#include "chat/methods.h"
#include "chat/value_text.h"

namespace winnow::chat {
namespace {

// As in Jinja's sandbox.
constexpr int64_t kMaxRange = 100'000;

constexpr std::string_view kFunctions[] = {"raise_exception", "strftime_now", "namespace", "dict",
                                           "range"};

// What a statement does to the loop around it.
enum class Flow { kNext, kBreak, kContinue };

struct Scope {
  std::unordered_map<std::string, Value> names = {};
  // Of a macro: the template's own names are seen from within, its caller's are not.
  bool is_macro = false;
};

class Interpreter {
 public:
  Interpreter(std::vector<std::pair<std::string, Value>> variables,
              const std::function<std::tm()>& now, uint64_t input_bytes)
      : budget_(input_bytes), now_(now) {
    scopes_.emplace_back();
    for (auto& [name, value] : variables) scopes_[0].names[name] = std::move(value);
  }

  RenderedText Run(const Block& block) {
    try {
      Execute(block);
    } catch (const Problem& problem) {
      if (problem.line() > 0) throw;
      throw Problem(problem.what(), line_);
    }
    return {std::move(main_text_), std::move(generated_)};
  }

 private:
  // Counts how deep evaluation is nested, so that no template can exhaust the stack.
  class Nested {
   public:
    explicit Nested(Interpreter& interpreter) : depth_(interpreter.depth_) {
      interpreter.budget_.UseSteps(1);
      if (depth_ >= kMaxEvaluationDepth) throw Problem("calls are nested too deeply");
      ++depth_;
    }
    ~Nested() { --depth_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    int& depth_;
  };
  class NewScope {
   public:
    NewScope(Interpreter& interpreter, bool is_macro) : scopes_(interpreter.scopes_) {
      scopes_.push_back({.is_macro = is_macro});
    }
    ~NewScope() { scopes_.pop_back(); }
    NewScope(const NewScope&) = delete;
    NewScope& operator=(const NewScope&) = delete;

   private:
    std::deque<Scope>& scopes_;
  };

  void Write(std::string_view text) {
    budget_.UseBytes(text.size());
    *out_ += text;
  }

  Flow Execute(const Block& block) {
    for (const auto& statement : block) {
      const Flow flow = Execute(*statement);
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Flow Execute(const Statement& statement) {
    const Nested nested(*this);
    line_ = statement.line;
    switch (statement.kind) {
      case StatementKind::kText:
        Write(statement.text);
        return Flow::kNext;
      case StatementKind::kPrint:
        Write(ToText(Evaluate(*statement.value), budget_));
        return Flow::kNext;
      case StatementKind::kIf:
        return ExecuteIf(statement);
      case StatementKind::kFor:
        return ExecuteFor(statement);
      case StatementKind::kSet:
        Assign(statement.target, Evaluate(*statement.value));
        return Flow::kNext;
      case StatementKind::kSetBlock:
        Assign(statement.target, Filtered(statement));
        return Flow::kNext;
      case StatementKind::kFilterBlock:
        Write(ToText(Filtered(statement), budget_));
        return Flow::kNext;
      case StatementKind::kMacro:
        scopes_.back().names[statement.text] =
            Value::OfFunction({.name = statement.text, .macro = &statement});
        return Flow::kNext;
      case StatementKind::kWith:
        return ExecuteWith(statement);
      case StatementKind::kGeneration:
        return ExecuteGeneration(statement);
      case StatementKind::kBreak:
        return Flow::kBreak;
      case StatementKind::kContinue:
        return Flow::kContinue;
    }
    return Flow::kNext;
  }

  Flow ExecuteIf(const Statement& statement) {
    for (const Branch& branch : statement.branches) {
      if (Evaluate(*branch.condition).IsTrue()) return Execute(branch.body);
    }
    return Execute(statement.otherwise);
  }

  Flow ExecuteFor(const Statement& statement) {
    std::vector<Value> items = Items(Evaluate(*statement.value), budget_);
    if (statement.condition != nullptr) items = FilterItems(statement, std::move(items));
    const Value list = Value::OfList(std::move(items));
    const std::vector<Value>& all = list.list().items;
    if (all.empty()) return Execute(statement.otherwise);
    ++loop_depth_;
    for (size_t i = 0; i < all.size(); ++i) {
      budget_.UseSteps(1);
      const NewScope scope(*this, false);
      scopes_.back().names["loop"] = Value::OfLoop(std::make_shared<const Loop>(
          Loop{list.shared_list(), static_cast<int64_t>(i), loop_depth_}));
      Assign(statement.target, all[i]);
      if (Execute(statement.body) == Flow::kBreak) break;
    }
    --loop_depth_;
    return Flow::kNext;
  }

  std::vector<Value> FilterItems(const Statement& statement, std::vector<Value> items) {
    std::vector<Value> kept;
    for (Value& item : items) {
      const NewScope scope(*this, false);
      Assign(statement.target, item);
      if (Evaluate(*statement.condition).IsTrue()) kept.push_back(std::move(item));
    }
    return kept;
  }

  Flow ExecuteWith(const Statement& statement) {
    std::vector<Value> values;
    for (const Parameter& variable : statement.parameters) {
      values.push_back(Evaluate(*variable.value));
    }
    const NewScope scope(*this, false);
    for (size_t i = 0; i < values.size(); ++i) {
      scopes_.back().names[statement.parameters[i].name] = std::move(values[i]);
    }
    return Execute(statement.body);
  }

  Flow ExecuteGeneration(const Statement& statement) {
    const NewScope scope(*this, false);
    const size_t begin = out_->size();
    const Flow flow = Execute(statement.body);
    if (out_ == &main_text_) generated_.emplace_back(begin, out_->size());
    return flow;
  }

  // What a block writes, kept as text.
  std::string Capture(const Block& block) {
    std::string text;
    std::string* const outer = std::exchange(out_, &text);
    Execute(block);
    out_ = outer;
    return text;
  }

  Value Filtered(const Statement& statement) {
    Value text;
    {
      const NewScope scope(*this, false);
      text = Value::String(Capture(statement.body));
    }
    return statement.value == nullptr ? text : EvaluateFilter(*statement.value, &text);
  }

  void Assign(const Target& target, const Value& value) {
    if (!target.attribute.empty()) {
      const Value* space = Find(target.names[0]);
      if (space == nullptr || !space->is(Kind::kNamespace)) {
        throw Problem(fmt::format("{}.{} cannot be set: {} is no namespace", target.names[0],
                                  target.attribute, target.names[0]));
      }
      space->target().Set(target.attribute, value);
      return;
    }
    auto& names = scopes_.back().names;
    if (!target.is_tuple) {
      names[target.names[0]] = value;
      return;
    }
    std::vector<Value> items = Items(value, budget_);
    if (items.size() != target.names.size()) {
      throw Problem(fmt::format("{} values for {} names", items.size(), target.names.size()));
    }
    for (size_t i = 0; i < items.size(); ++i) names[target.names[i]] = std::move(items[i]);
  }

  const Value* Find(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto found = scopes_[i].names.find(name);
      if (found != scopes_[i].names.end()) return &found->second;
      if (scopes_[i].is_macro) i = 1;  // straight to the template's own names
    }
    return nullptr;
  }

  Value LookUp(const std::string& name) const {
    if (const Value* found = Find(name)) return *found;
    const bool is_function =
        std::find(std::begin(kFunctions), std::end(kFunctions), name) != std::end(kFunctions);
    if (is_function) return Value::OfFunction({.name = name});
    return Value::Undefined(fmt::format("\"{}\" is undefined", name));
  }

  Value Evaluate(const Expr& expr) {
    const Nested nested(*this);
    line_ = expr.line;
    switch (expr.kind) {
      case ExprKind::kConstant:
        return expr.constant;
      case ExprKind::kName:
        return LookUp(expr.name);
      case ExprKind::kList:
        return Value::OfList(EvaluateAll(expr, 0));
      case ExprKind::kTuple:
        return Value::OfList(EvaluateAll(expr, 0), ListKind::kTuple);
      case ExprKind::kDict:
        return EvaluateDict(expr);
      case ExprKind::kAttribute:
        return GetAttribute(Evaluate(*expr.operands[0]), expr.name, budget_);
      case ExprKind::kSubscript: {
        const Value object = Evaluate(*expr.operands[0]);
        return GetItem(object, Evaluate(*expr.operands[1]), budget_);
      }
      case ExprKind::kSlice:
        return EvaluateSlice(expr);
      case ExprKind::kCall:
        return EvaluateCall(expr);
      case ExprKind::kFilter:
        return EvaluateFilter(expr, nullptr);
      case ExprKind::kTest:
        return EvaluateTest(expr);
      case ExprKind::kNot:
        return Value::Bool(!Evaluate(*expr.operands[0]).IsTrue());
      case ExprKind::kNegate:
        return Negate(Evaluate(*expr.operands[0]));
      case ExprKind::kPlus:
        return Calculate(Operator::kAdd, Value::Integer(0), Evaluate(*expr.operands[0]), budget_);
      case ExprKind::kAnd:
      case ExprKind::kOr:
        return EvaluateLogic(expr);
      case ExprKind::kConcat:
        return EvaluateConcat(expr);
      case ExprKind::kArithmetic:
        return EvaluateArithmetic(expr);
      case ExprKind::kCompare:
        return EvaluateCompare(expr);
      case ExprKind::kConditional:
        return EvaluateConditional(expr);
    }
    return {};
  }

  std::vector<Value> EvaluateAll(const Expr& expr, size_t first) {
    std::vector<Value> values;
    for (size_t i = first; i < expr.operands.size(); ++i) {
      values.push_back(Evaluate(*expr.operands[i]));
    }
    return values;
  }

  Arguments EvaluateArguments(const Expr& expr) {
    Arguments arguments{EvaluateAll(expr, 1), {}};
    for (const auto& [name, value] : expr.named) {
      arguments.named.emplace_back(name, Evaluate(*value));
    }
    line_ = expr.line;
    return arguments;
  }

  Value EvaluateDict(const Expr& expr) {
    Namespace items;  // keeps the first place and the last value of a key
    for (size_t i = 0; i + 1 < expr.operands.size(); i += 2) {
      const Value key = Evaluate(*expr.operands[i]);
      if (!key.is(Kind::kString)) {
        throw Problem(
            fmt::format("{} as the key of a dictionary is not supported", key.KindName()));
      }
      budget_.UseSteps(items.items.size() / 8);
      items.Set(key.text(), Evaluate(*expr.operands[i + 1]));
    }
    return Value::OfDict(std::move(items.items));
  }

  Value EvaluateSlice(const Expr& expr) {
    const Value object = Evaluate(*expr.operands[0]);
    Value parts[3];
    for (size_t i = 0; i < 3; ++i) {
      if (expr.operands[i + 1] != nullptr) parts[i] = Evaluate(*expr.operands[i + 1]);
    }
    return GetSlice(object, parts[0], parts[1], parts[2], budget_);
  }

  // `text`: the value of a filter without one.
  Value EvaluateFilter(const Expr& expr, const Value* text) {
    if (expr.operands[0] == nullptr) {
      const Arguments arguments = EvaluateArguments(expr);
      return ApplyFilter(expr.name, *text, arguments, budget_);
    }
    // A filter of a filter block: the block's text is at the end of the chain.
    const Expr& inner = *expr.operands[0];
    const bool is_chain = text != nullptr && inner.kind == ExprKind::kFilter;
    const Value value = is_chain ? EvaluateFilter(inner, text) : Evaluate(inner);
    const Arguments arguments = EvaluateArguments(expr);
    return ApplyFilter(expr.name, value, arguments, budget_);
  }

  Value EvaluateTest(const Expr& expr) {
    const Value value = Evaluate(*expr.operands[0]);
    const Arguments arguments = EvaluateArguments(expr);
    return Value::Bool(ApplyTest(expr.name, value, arguments, budget_));
  }

  Value EvaluateLogic(const Expr& expr) {
    Value value;
    for (const ExprPtr& operand : expr.operands) {
      value = Evaluate(*operand);
      if (value.IsTrue() == (expr.kind == ExprKind::kOr)) break;
    }
    return value;
  }

  Value EvaluateConcat(const Expr& expr) {
    std::string text;
    for (const ExprPtr& operand : expr.operands) text += ToText(Evaluate(*operand), budget_);
    return Value::String(std::move(text));
  }

  Value EvaluateArithmetic(const Expr& expr) {
    Value value = Evaluate(*expr.operands[0]);
    for (size_t i = 0; i < expr.operators.size(); ++i) {
      const Value other = Evaluate(*expr.operands[i + 1]);
      value = Calculate(expr.operators[i], value, other, budget_);
    }
    return value;
  }

  Value EvaluateCompare(const Expr& expr) {
    Value left = Evaluate(*expr.operands[0]);
    for (size_t i = 0; i < expr.operators.size(); ++i) {
      Value right = Evaluate(*expr.operands[i + 1]);
      if (!Holds(expr.operators[i], left, right, budget_)) return Value::Bool(false);
      left = std::move(right);
    }
    return Value::Bool(true);
  }

  Value EvaluateConditional(const Expr& expr) {
    if (Evaluate(*expr.operands[1]).IsTrue()) return Evaluate(*expr.operands[0]);
    if (expr.operands[2] != nullptr) return Evaluate(*expr.operands[2]);
    return Value::Undefined("a condition without else does not hold");
  }

  Value EvaluateCall(const Expr& expr) {
    const Value callee = Evaluate(*expr.operands[0]);
    if (callee.is(Kind::kUndefined)) throw Problem(callee.Reason());
    if (!callee.is(Kind::kFunction)) {
      throw Problem(fmt::format("{} cannot be called", callee.KindName()));
    }
    const Arguments arguments = EvaluateArguments(expr);
    const Function& function = callee.function();
    if (function.is_method) return CallMethod(function.self, function.name, arguments, budget_);
    if (function.macro != nullptr) return CallMacro(*function.macro, arguments);
    return CallFunction(function.name, arguments);
  }

  Value CallMacro(const Statement& macro, const Arguments& arguments) {
    std::vector<std::string_view> names;
    for (const Parameter& parameter : macro.parameters) names.push_back(parameter.name);
    std::vector<Value> values = BindArguments(arguments, names, 0, macro.text);
    const NewScope scope(*this, true);
    const int64_t loop_depth = std::exchange(loop_depth_, 0);
    for (size_t i = 0; i < names.size(); ++i) {
      const Parameter& parameter = macro.parameters[i];
      if (values[i].is(Kind::kUndefined) && parameter.value != nullptr) {
        values[i] = Evaluate(*parameter.value);
      }
      scopes_.back().names[parameter.name] = std::move(values[i]);
    }
    Value result = Value::String(Capture(macro.body));
    loop_depth_ = loop_depth;
    return result;
  }

  Value CallFunction(const std::string& name, const Arguments& arguments) {
    if (name == "range") return Range(arguments);
    if (name == "raise_exception") {
      throw Refusal(ToText(BindArguments(arguments, {"message"}, 1, name)[0], budget_));
    }
    if (name == "strftime_now") {
      const Value format = BindArguments(arguments, {"format"}, 1, name)[0];
      if (!format.is(Kind::kString)) throw Problem("strftime_now needs a string");
      return Value::String(FormatTime(format.text()));
    }
    // namespace(...), dict(...): named arguments, or a dictionary and named arguments
    Namespace space;
    if (arguments.positional.size() > 1) {
      throw Problem(fmt::format("{} takes one dictionary and named arguments", name));
    }
    for (const Value& from : arguments.positional) {
      if (!from.is(Kind::kDict)) throw Problem(fmt::format("{} needs a dictionary", name));
      budget_.UseSteps(from.dict().items.size());
      space.items = from.dict().items;
    }
    for (const auto& [key, value] : arguments.named) space.Set(key, value);
    if (name == "dict") return Value::OfDict(std::move(space.items));
    return Value::OfNamespace(&namespaces_.emplace_back(std::move(space)));
  }

  Value Range(const Arguments& arguments) {
    const std::vector<Value> bound =
        BindArguments(arguments, {"start", "stop", "step"}, 1, "range");
    const auto whole = [&](const Value& value, int64_t fallback) {
      if (value.is(Kind::kUndefined)) return fallback;
      if (value.IsWhole()) return value.AsInteger();
      throw Problem(fmt::format("range needs whole numbers, got {}", value.KindName()));
    };
    const bool has_stop = !bound[1].is(Kind::kUndefined);
    const int64_t start = has_stop ? whole(bound[0], 0) : 0;
    const int64_t stop = whole(has_stop ? bound[1] : bound[0], 0);
    const int64_t step = whole(bound[2], 1);
    if (step == 0) throw Problem("the step of a range is 0");
    std::vector<Value> items;
    for (int64_t at = start; step > 0 ? at < stop : at > stop;) {
      if (std::ssize(items) == kMaxRange) {
        throw Problem(fmt::format("a range has more than {} items", kMaxRange));
      }
      items.push_back(Value::Integer(at));
      if (__builtin_add_overflow(at, step, &at)) break;
    }
    budget_.UseSteps(items.size());
    return Value::OfList(std::move(items));
  }

  std::string FormatTime(const std::string& format) const {
    constexpr size_t kMostBytes = 1024;
    if (format.find('\0') != std::string::npos) throw Problem("strftime_now: a zero byte");
    const std::tm time = now_();
    char text[kMostBytes];
    // A letter in front tells an empty result from one that does not fit.
    const std::string guarded = "x" + format;
#pragma GCC diagnostic push  // any format is safe: it only decides what is written, within `text`
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    const size_t bytes = std::strftime(text, sizeof text, guarded.c_str(), &time);
#pragma GCC diagnostic pop
    if (bytes == 0) {
      throw Problem(fmt::format("strftime_now writes more than {} bytes", kMostBytes));
    }
    return {text + 1, bytes - 1};
  }

  Budget budget_;
  const std::function<std::tm()>& now_;
  std::deque<Scope> scopes_;
  std::deque<Namespace> namespaces_;  // values point into it
  std::string main_text_;
  std::string* out_ = &main_text_;
  std::vector<std::pair<size_t, size_t>> generated_;
  int line_ = 0;
  int depth_ = 0;
  int64_t loop_depth_ = 0;
};

}  // namespace

RenderedText Interpret(const Block& block, std::vector<std::pair<std::string, Value>> variables,
                       const std::function<std::tm()>& now, uint64_t input_bytes) {
  return Interpreter(std::move(variables), now, input_bytes).Run(block);
}

}  // namespace winnow::chat
