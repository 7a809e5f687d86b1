#include "chat/operators.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "chat/methods.h"
#include "chat/text_functions.h"
#include "tokenizer/utf8.h"

namespace winnow::chat {
namespace {

[[noreturn]] void ThrowOperands(Operator op, const Value& a, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (value->is(Kind::kUndefined)) throw Problem(value->Reason());
  }
  throw Problem(
      fmt::format("\"{}\" cannot take {} and {}", OperatorName(op), a.KindName(), b.KindName()));
}

int64_t Checked(bool overflows, int64_t result) {
  if (overflows) throw Problem("a number does not fit 64 bits");
  return result;
}

int64_t WholePower(int64_t base, int64_t exponent) {
  int64_t result = 1;
  for (int64_t i = 0; i < exponent; ++i) {
    if (base == 0 || base == 1) return base;
    if (base == -1) return exponent % 2 == 0 ? 1 : -1;
    const bool overflows = __builtin_mul_overflow(result, base, &result);
    Checked(overflows, 0);
  }
  return result;
}

Value CalculateWhole(Operator op, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (op) {
    case Operator::kAdd:
      return Value::Integer(Checked(__builtin_add_overflow(a, b, &result), result));
    case Operator::kSubtract:
      return Value::Integer(Checked(__builtin_sub_overflow(a, b, &result), result));
    case Operator::kMultiply:
      return Value::Integer(Checked(__builtin_mul_overflow(a, b, &result), result));
    case Operator::kPower:
      if (b < 0) return Value::Float(std::pow(static_cast<double>(a), static_cast<double>(b)));
      return Value::Integer(WholePower(a, b));
    default:
      break;
  }
  if (b == 0) throw Problem("division by zero");
  if (op == Operator::kDivide) return Value::Float(static_cast<double>(a) / static_cast<double>(b));
  Checked(a == std::numeric_limits<int64_t>::min() && b == -1, 0);
  const int64_t rest = a % b;
  const bool rounds_up = rest != 0 && (rest < 0) != (b < 0);  // C rounds to 0, Python down
  if (op == Operator::kModulo) return Value::Integer(rounds_up ? rest + b : rest);
  return Value::Integer(rounds_up ? a / b - 1 : a / b);
}

Value CalculateFloat(Operator op, double a, double b) {
  switch (op) {
    case Operator::kAdd:
      return Value::Float(a + b);
    case Operator::kSubtract:
      return Value::Float(a - b);
    case Operator::kMultiply:
      return Value::Float(a * b);
    case Operator::kPower:
      return Value::Float(std::pow(a, b));
    default:
      break;
  }
  if (b == 0) throw Problem("division by zero");
  if (op == Operator::kDivide) return Value::Float(a / b);
  if (op == Operator::kFloorDivide) return Value::Float(std::floor(a / b));
  const double rest = std::fmod(a, b);
  return Value::Float(rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest);
}

Value Concatenate(const Value& a, const Value& b, Budget& budget) {
  if (a.is(Kind::kString) && b.is(Kind::kString)) {
    budget.UseBytes(a.text().size() + b.text().size());
    return Value::String(a.text() + b.text());
  }
  const bool are_lists = a.is(Kind::kList) && b.is(Kind::kList) && a.list().kind == b.list().kind &&
                         a.list().kind != ListKind::kGenerator;
  if (!are_lists) ThrowOperands(Operator::kAdd, a, b);
  budget.UseSteps(a.list().items.size() + b.list().items.size());
  std::vector<Value> items = a.list().items;
  items.insert(items.end(), b.list().items.begin(), b.list().items.end());
  return Value::OfList(std::move(items), a.list().kind);
}

Value Repeat(const Value& value, int64_t times, Budget& budget) {
  times = std::max<int64_t>(times, 0);
  const uint64_t size = value.is(Kind::kString) ? value.text().size() : value.list().items.size();
  uint64_t total = 0;
  if (__builtin_mul_overflow(size, static_cast<uint64_t>(times), &total)) {
    total = std::numeric_limits<uint64_t>::max();
  }
  if (value.is(Kind::kString)) {
    budget.UseBytes(total);
    std::string text;
    text.reserve(total);
    for (int64_t i = 0; size > 0 && i < times; ++i) text += value.text();
    return Value::String(std::move(text));
  }
  budget.UseSteps(total);
  std::vector<Value> items;
  for (int64_t i = 0; size > 0 && i < times; ++i) {
    items.insert(items.end(), value.list().items.begin(), value.list().items.end());
  }
  return Value::OfList(std::move(items), value.list().kind);
}

bool Contains(const Value& container, const Value& value, Budget& budget) {
  switch (container.kind()) {
    case Kind::kString:
      if (!value.is(Kind::kString)) ThrowOperands(Operator::kIn, value, container);
      budget.UseBytes(container.text().size());
      return FindText(container.text(), value.text()) != std::string_view::npos;
    case Kind::kDict:
      budget.UseSteps(container.dict().items.size() / 8);
      return value.is(Kind::kString) && container.dict().Find(value.text()) != nullptr;
    case Kind::kList:
      return std::any_of(container.list().items.begin(), container.list().items.end(),
                         [&](const Value& item) { return Equal(item, value, budget); });
    case Kind::kUndefined:
      return false;
    default:
      ThrowOperands(Operator::kIn, value, container);
  }
}

bool EqualDicts(const Dict& a, const Dict& b, Budget& budget) {
  if (a.items.size() != b.items.size()) return false;
  return std::all_of(a.items.begin(), a.items.end(), [&](const auto& item) {
    budget.UseSteps(b.items.size() / 8);
    const Value* other = b.Find(item.first);
    return other != nullptr && Equal(item.second, *other, budget);
  });
}

Value LoopAttribute(const Loop& loop, const std::string& name) {
  const int64_t length = std::ssize(loop.items->items);
  const auto item = [&](int64_t at, const char* why) {
    return at >= 0 && at < length ? loop.items->items[static_cast<size_t>(at)]
                                  : Value::Undefined(why);
  };
  if (name == "index") return Value::Integer(loop.index + 1);
  if (name == "index0") return Value::Integer(loop.index);
  if (name == "revindex") return Value::Integer(length - loop.index);
  if (name == "revindex0") return Value::Integer(length - loop.index - 1);
  if (name == "first") return Value::Bool(loop.index == 0);
  if (name == "last") return Value::Bool(loop.index + 1 == length);
  if (name == "length") return Value::Integer(length);
  if (name == "depth") return Value::Integer(loop.depth);
  if (name == "depth0") return Value::Integer(loop.depth - 1);
  if (name == "previtem") return item(loop.index - 1, "there is no previous item");
  if (name == "nextitem") return item(loop.index + 1, "there is no next item");
  throw Problem(fmt::format("loop.{} is not supported", name));
}

const Value* FindKey(const Value& value, const std::string& name, Budget& budget) {
  if (value.is(Kind::kDict)) {
    budget.UseSteps(value.dict().items.size() / 8);
    return value.dict().Find(name);
  }
  if (value.is(Kind::kNamespace)) return value.target().Find(name);
  return nullptr;
}

Value NoSuch(const Value& value, const std::string& what) {
  return Value::Undefined(fmt::format("{} has no {}", value.KindName(), what));
}

std::optional<int64_t> SlicePosition(const Value& value) {
  if (value.is(Kind::kUndefined) || value.is(Kind::kNone)) return std::nullopt;
  if (!value.IsWhole()) {
    throw Problem(fmt::format("a slice needs whole numbers, got {}", value.KindName()));
  }
  return value.AsInteger();
}

}  // namespace

const char* OperatorName(Operator op) {
  static constexpr const char* kNames[] = {
      "+", "-", "*", "/", "//", "%", "**", "==", "!=", "<", "<=", ">", ">=", "in", "not in"};
  return kNames[static_cast<size_t>(op)];
}

Value Calculate(Operator op, const Value& a, const Value& b, Budget& budget) {
  if (a.IsWhole() && b.IsWhole()) return CalculateWhole(op, a.AsInteger(), b.AsInteger());
  if (a.IsNumber() && b.IsNumber()) return CalculateFloat(op, a.AsDouble(), b.AsDouble());
  const auto repeats = [](const Value& value) {
    return value.is(Kind::kString) ||
           (value.is(Kind::kList) && value.list().kind != ListKind::kGenerator);
  };
  if (op == Operator::kMultiply && repeats(a) && b.IsWhole())
    return Repeat(a, b.AsInteger(), budget);
  if (op == Operator::kMultiply && repeats(b) && a.IsWhole())
    return Repeat(b, a.AsInteger(), budget);
  if (op == Operator::kAdd) return Concatenate(a, b, budget);
  if (op == Operator::kModulo && a.is(Kind::kString)) {
    throw Problem("formatting a string with % is not supported");
  }
  ThrowOperands(op, a, b);
}

Value Negate(const Value& value) {
  if (value.is(Kind::kFloat)) return Value::Float(-value.number());
  if (value.IsWhole()) return CalculateWhole(Operator::kSubtract, 0, value.AsInteger());
  if (value.is(Kind::kUndefined)) throw Problem(value.Reason());
  throw Problem(fmt::format("\"-\" cannot take {}", value.KindName()));
}

bool Equal(const Value& a, const Value& b, Budget& budget) {
  budget.UseSteps(1);
  if (a.IsWhole() && b.IsWhole()) return a.AsInteger() == b.AsInteger();
  if (a.IsNumber() && b.IsNumber()) return a.AsDouble() == b.AsDouble();
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kString:
      if (a.text().size() != b.text().size()) return false;
      budget.UseBytes(a.text().size());
      return a.text() == b.text();
    case Kind::kList:
      return a.list().kind == b.list().kind &&
             std::equal(a.list().items.begin(), a.list().items.end(), b.list().items.begin(),
                        b.list().items.end(),
                        [&](const Value& x, const Value& y) { return Equal(x, y, budget); });
    case Kind::kDict:
      return EqualDicts(a.dict(), b.dict(), budget);
    case Kind::kNamespace:
      return &a.target() == &b.target();
    case Kind::kUndefined:
    case Kind::kNone:
      return true;
    case Kind::kFunction:
      return &a.function() == &b.function();
    default:
      return &a.loop() == &b.loop();
  }
}

int Order(const Value& a, const Value& b, Budget& budget) {
  budget.UseSteps(1);
  if (a.IsWhole() && b.IsWhole()) {
    return a.AsInteger() < b.AsInteger() ? -1 : a.AsInteger() > b.AsInteger();
  }
  if (a.IsNumber() && b.IsNumber()) {
    return a.AsDouble() < b.AsDouble() ? -1 : a.AsDouble() > b.AsDouble();
  }
  if (a.is(Kind::kString) && b.is(Kind::kString)) {
    budget.UseBytes(std::min(a.text().size(), b.text().size()));
    return a.text().compare(b.text());  // UTF-8 sorts as its characters do
  }
  if (!a.is(Kind::kList) || !b.is(Kind::kList)) ThrowOperands(Operator::kLess, a, b);
  const std::vector<Value>&x = a.list().items, &y = b.list().items;
  for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
    if (!Equal(x[i], y[i], budget)) return Order(x[i], y[i], budget);
  }
  return x.size() < y.size() ? -1 : x.size() > y.size();
}

bool Holds(Operator op, const Value& a, const Value& b, Budget& budget) {
  switch (op) {
    case Operator::kEqual:
      return Equal(a, b, budget);
    case Operator::kNotEqual:
      return !Equal(a, b, budget);
    case Operator::kIn:
      return Contains(b, a, budget);
    case Operator::kNotIn:
      return !Contains(b, a, budget);
    case Operator::kLess:
      return Order(a, b, budget) < 0;
    case Operator::kLessEqual:
      return Order(a, b, budget) <= 0;
    case Operator::kGreater:
      return Order(a, b, budget) > 0;
    default:
      return Order(a, b, budget) >= 0;
  }
}

Value GetAttribute(const Value& value, const std::string& name, Budget& budget) {
  if (value.is(Kind::kUndefined)) throw Problem(value.Reason());
  if (value.is(Kind::kLoop)) return LoopAttribute(value.loop(), name);
  if (IsMethod(value, name)) {
    return Value::OfFunction({.name = name, .self = value, .is_method = true});
  }
  if (const Value* found = FindKey(value, name, budget)) return *found;
  if (IsRefusedMethod(value, name)) {
    throw Problem(fmt::format("method \"{}\" of {} is not supported", name, value.KindName()));
  }
  return NoSuch(value, fmt::format("attribute \"{}\"", name));
}

Value GetItem(const Value& value, const Value& key, Budget& budget) {
  if (value.is(Kind::kUndefined)) throw Problem(value.Reason());
  if (key.is(Kind::kString)) {
    if (const Value* found = FindKey(value, key.text(), budget)) return *found;
    if (value.is(Kind::kLoop) || IsMethod(value, key.text())) {
      return GetAttribute(value, key.text(), budget);
    }
    return NoSuch(value, fmt::format("key \"{}\"", key.text()));
  }
  const bool is_text = value.is(Kind::kString);
  const bool is_list = value.is(Kind::kList) && value.list().kind != ListKind::kGenerator;
  if (!key.IsWhole() || (!is_text && !is_list)) return NoSuch(value, "such key");
  const int64_t size = Length(value, budget);
  const int64_t wanted = key.AsInteger();
  const int64_t index = wanted < 0 ? wanted + size : wanted;
  if (index < 0 || index >= size) return NoSuch(value, fmt::format("element {}", wanted));
  if (is_list) return value.list().items[static_cast<size_t>(index)];
  return GetSlice(value, Value::Integer(index), Value::Integer(index + 1), {}, budget);
}

Value GetSlice(const Value& value, const Value& start, const Value& stop, const Value& step,
               Budget& budget) {
  if (value.is(Kind::kUndefined)) throw Problem(value.Reason());
  if (!value.is(Kind::kString) &&
      !(value.is(Kind::kList) && value.list().kind != ListKind::kGenerator)) {
    throw Problem(fmt::format("{} cannot be sliced", value.KindName()));
  }
  // Steps longer than any text are all the same.
  constexpr int64_t kLongStep = int64_t{1} << 40;
  const int64_t stride = std::clamp(SlicePosition(step).value_or(1), -kLongStep, kLongStep);
  if (stride == 0) throw Problem("the step of a slice is 0");
  const int64_t size = Length(value, budget);
  const SliceRange range = ResolveSlice(size, SlicePosition(start), SlicePosition(stop), stride);
  if (value.is(Kind::kString)) {
    budget.UseBytes(value.text().size());
    const std::u32string all = Decode(value.text());
    std::string text;
    for (int64_t i = 0; i < range.count; ++i) {
      tok::AppendUtf8(all[static_cast<size_t>(range.start + i * range.step)], text);
    }
    return Value::String(std::move(text));
  }
  budget.UseSteps(static_cast<uint64_t>(range.count));
  std::vector<Value> items;
  for (int64_t i = 0; i < range.count; ++i) {
    items.push_back(value.list().items[static_cast<size_t>(range.start + i * range.step)]);
  }
  return Value::OfList(std::move(items), value.list().kind);
}

int64_t Length(const Value& value, Budget& budget) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return 0;
    case Kind::kString:
      budget.UseBytes(value.text().size());
      return CountCharacters(value.text());
    case Kind::kList:
      if (value.list().kind == ListKind::kGenerator) {
        throw Problem("the result of a filter has no length before it is made a list");
      }
      return std::ssize(value.list().items);
    case Kind::kDict:
      return std::ssize(value.dict().items);
    default:
      throw Problem(fmt::format("{} has no length", value.KindName()));
  }
}

std::vector<Value> Items(const Value& value, Budget& budget) {
  std::vector<Value> items;
  switch (value.kind()) {
    case Kind::kUndefined:
      return items;
    case Kind::kList:
      budget.UseSteps(value.list().items.size());
      return value.list().items;
    case Kind::kDict:
      budget.UseSteps(value.dict().items.size());
      for (const auto& [key, item] : value.dict().items) items.push_back(Value::String(key));
      return items;
    case Kind::kString:
      budget.UseSteps(8 * value.text().size());  // a string of its own takes about as much memory
      for (size_t at = 0; at < value.text().size();) {
        const size_t bytes = tok::CharBytes(value.text()[at]);
        items.push_back(Value::String(value.text().substr(at, bytes)));
        at += bytes;
      }
      return items;
    default:
      throw Problem(fmt::format("{} cannot be iterated over", value.KindName()));
  }
}

std::vector<Value> Pairs(const Value& value, std::string_view callee, Budget& budget) {
  if (value.is(Kind::kUndefined)) return {};
  if (!value.is(Kind::kDict)) {
    throw Problem(fmt::format("{} needs a dictionary, got {}", callee, value.KindName()));
  }
  budget.UseSteps(value.dict().items.size());
  std::vector<Value> pairs;
  for (const auto& [key, item] : value.dict().items) {
    pairs.push_back(Value::OfList({Value::String(key), item}, ListKind::kTuple));
  }
  return pairs;
}

}  // namespace winnow::chat
