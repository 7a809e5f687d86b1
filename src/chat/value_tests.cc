// `is defined`, `is string` and the like.
#include <fmt/format.h>

#include <algorithm>

#include "chat/filters.h"
#include "chat/operators.h"
#include "chat/text_functions.h"

namespace winnow::chat {
namespace {

struct TestCall {
  const Value& value;
  const Arguments& arguments;
  Budget& budget;

  Value Argument(std::string_view name) const {
    return BindArguments(arguments, {"other"}, 1, name)[0];
  }
  bool Compare(Operator op) const { return Holds(op, value, Argument(OperatorName(op)), budget); }
  int64_t Whole() const {
    if (value.IsWhole()) return value.AsInteger();
    throw Problem(fmt::format("the test needs a whole number, got {}", value.KindName()));
  }
};

bool IsSequence(const Value& v) {
  const bool is_generator = v.is(Kind::kList) && v.list().kind == ListKind::kGenerator;
  return (v.is(Kind::kList) && !is_generator) || v.is(Kind::kString) || v.is(Kind::kDict) ||
         v.is(Kind::kUndefined);
}

bool IsIterable(const Value& v) {
  return IsSequence(v) || v.is(Kind::kList) || v.is(Kind::kLoop);
}

bool IsDivisible(const TestCall& call) {
  const Value by = call.Argument("divisibleby");
  if (!by.IsWhole() || by.AsInteger() == 0)
    throw Problem("divisibleby needs a number that is not 0");
  return by.AsInteger() == -1 || call.Whole() % by.AsInteger() == 0;
}

bool IsSame(const TestCall& call) {
  const Value other = call.Argument("sameas");
  return call.value.kind() == other.kind() && Equal(call.value, other, call.budget);
}

template <Kind kKind>
bool Is(const TestCall& call) {
  BindArguments(call.arguments, {}, 0, "the test");
  return call.value.is(kKind);
}

template <Operator kOperator>
bool Compares(const TestCall& call) {
  return call.Compare(kOperator);
}

struct Test {
  std::string_view name;
  bool (*holds)(const TestCall&);
};
constexpr Test kTests[] = {
    {"defined", [](const TestCall& c) { return !c.value.is(Kind::kUndefined); }},
    {"undefined", Is<Kind::kUndefined>},
    {"none", Is<Kind::kNone>},
    {"string", Is<Kind::kString>},
    {"mapping", Is<Kind::kDict>},
    {"boolean", Is<Kind::kBool>},
    {"integer", Is<Kind::kInteger>},
    {"float", Is<Kind::kFloat>},
    {"callable", Is<Kind::kFunction>},
    {"number", [](const TestCall& c) { return c.value.IsNumber(); }},
    {"true", [](const TestCall& c) { return c.value.is(Kind::kBool) && c.value.boolean(); }},
    {"false", [](const TestCall& c) { return c.value.is(Kind::kBool) && !c.value.boolean(); }},
    {"sequence", [](const TestCall& c) { return IsSequence(c.value); }},
    {"iterable", [](const TestCall& c) { return IsIterable(c.value); }},
    {"odd", [](const TestCall& c) { return c.Whole() % 2 != 0; }},
    {"even", [](const TestCall& c) { return c.Whole() % 2 == 0; }},
    {"divisibleby", IsDivisible},
    {"upper",
     [](const TestCall& c) { return c.value.is(Kind::kString) && IsUpper(c.value.text()); }},
    {"lower",
     [](const TestCall& c) { return c.value.is(Kind::kString) && IsLower(c.value.text()); }},
    {"sameas", IsSame},
    {"in", Compares<Operator::kIn>},
    {"eq", Compares<Operator::kEqual>},
    {"equalto", Compares<Operator::kEqual>},
    {"==", Compares<Operator::kEqual>},
    {"ne", Compares<Operator::kNotEqual>},
    {"!=", Compares<Operator::kNotEqual>},
    {"lt", Compares<Operator::kLess>},
    {"lessthan", Compares<Operator::kLess>},
    {"<", Compares<Operator::kLess>},
    {"le", Compares<Operator::kLessEqual>},
    {"<=", Compares<Operator::kLessEqual>},
    {"gt", Compares<Operator::kGreater>},
    {"greaterthan", Compares<Operator::kGreater>},
    {">", Compares<Operator::kGreater>},
    {"ge", Compares<Operator::kGreaterEqual>},
    {">=", Compares<Operator::kGreaterEqual>}};

const Test* FindTest(std::string_view name) {
  const auto* found = std::find_if(std::begin(kTests), std::end(kTests),
                                   [&](const Test& test) { return test.name == name; });
  return found == std::end(kTests) ? nullptr : found;
}

}  // namespace

bool IsTest(std::string_view name) {
  return FindTest(name) != nullptr;
}

bool ApplyTest(const std::string& name, const Value& value, const Arguments& arguments,
               Budget& budget) {
  const Test* test = FindTest(name);
  if (test == nullptr) throw Problem(fmt::format("test \"{}\" is not supported", name));
  budget.UseSteps(1);
  return test->holds({value, arguments, budget});
}

}  // namespace winnow::chat
