// What operators and look-ups do with values: Python's rules as far as templates use them.
#pragma once

#include <optional>

#include "chat/value.h"  // Value, Budget

namespace winnow::chat {

enum class Operator {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kFloorDivide,
  kModulo,
  kPower,
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn
};
const char* OperatorName(Operator op);

// kAdd .. kPower. Problem for operands that Python does not take, and for results beyond 64 bits.
Value Calculate(Operator op, const Value& a, const Value& b, Budget& budget);
Value Negate(const Value& value);
// kEqual .. kNotIn.
bool Holds(Operator op, const Value& a, const Value& b, Budget& budget);
bool Equal(const Value& a, const Value& b, Budget& budget);
// Negative, 0 or positive; of two numbers, strings or lists.
int Order(const Value& a, const Value& b, Budget& budget);

// `value.name`: a method, else the key of that name, else undefined. Problem if `value` is
// undefined.
Value GetAttribute(const Value& value, const std::string& name, Budget& budget);
// `value[key]`: the key, else the method of that name, else undefined.
Value GetItem(const Value& value, const Value& key, Budget& budget);
// `value[start:stop:step]`; undefined or none: left out.
Value GetSlice(const Value& value, const Value& start, const Value& stop, const Value& step,
               Budget& budget);

// Problem if the value has no length.
int64_t Length(const Value& value, Budget& budget);
// Items of a list, characters of a string, keys of a dictionary, nothing of an undefined value.
std::vector<Value> Items(const Value& value, Budget& budget);
// The key/value pairs of a dictionary as lists of two.
std::vector<Value> Pairs(const Value& value, std::string_view callee, Budget& budget);

}  // namespace winnow::chat
