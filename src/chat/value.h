// Values of the template language: what Python's objects are to Jinja. Lists, dictionaries and
// strings never change once made (transformers renders in an immutable sandbox), so copies share
// them; a namespace is the one thing that can be written to.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/json.h"    // OrderedJson
#include "chat/budget.h"  // Budget

namespace winnow::chat {

struct List;
struct Dict;
struct Namespace;
struct Function;
struct Loop;

enum class Kind {
  kUndefined,
  kNone,
  kBool,
  kInteger,
  kFloat,
  kString,
  kList,
  kDict,
  kNamespace,
  kFunction,
  kLoop
};

// How a list came to be: tuples print with parentheses, and what `map` and the like give has no
// length and is true even if it is empty.
enum class ListKind { kList, kTuple, kGenerator };

class Value {
 public:
  Value() = default;  // undefined
  // An undefined value that says why when it is used: "'dict object' has no attribute 'x'".
  static Value Undefined(std::string why);
  static Value None() { return Value(Storage(NoneTag{})); }
  static Value Bool(bool value) { return Value(Storage(value)); }
  static Value Integer(int64_t value) { return Value(Storage(value)); }
  static Value Float(double value) { return Value(Storage(value)); }
  static Value String(std::string text);
  // Problem if it is nested deeper than kMaxValueDepth.
  static Value OfList(std::vector<Value> items, ListKind kind = ListKind::kList);
  static Value OfDict(std::vector<std::pair<std::string, Value>> items);
  static Value OfFunction(Function function);
  static Value OfLoop(std::shared_ptr<const Loop> loop) { return Value(Storage(std::move(loop))); }
  // Must outlive every value that refers to it: the interpreter keeps it to the end of a rendering.
  static Value OfNamespace(Namespace* target) { return Value(Storage(target)); }
  // Ill-formed UTF-8 becomes U+FFFD.
  static Value FromJson(const OrderedJson& json);

  Kind kind() const { return static_cast<Kind>(storage_.index()); }
  bool is(Kind kind) const { return this->kind() == kind; }
  // Each only for its kind.
  bool boolean() const { return std::get<bool>(storage_); }
  int64_t integer() const { return std::get<int64_t>(storage_); }
  double number() const { return std::get<double>(storage_); }
  const std::string& text() const {
    return *std::get<std::shared_ptr<const std::string>>(storage_);
  }
  const List& list() const { return *std::get<std::shared_ptr<const List>>(storage_); }
  const std::shared_ptr<const List>& shared_list() const {
    return std::get<std::shared_ptr<const List>>(storage_);
  }
  const Dict& dict() const { return *std::get<std::shared_ptr<const Dict>>(storage_); }
  const Function& function() const { return *std::get<std::shared_ptr<const Function>>(storage_); }
  const Loop& loop() const { return *std::get<std::shared_ptr<const Loop>>(storage_); }
  Namespace& target() const { return *std::get<Namespace*>(storage_); }

  // Integers, and booleans as Python has them: 0 and 1.
  bool IsWhole() const { return is(Kind::kInteger) || is(Kind::kBool); }
  bool IsNumber() const { return IsWhole() || is(Kind::kFloat); }
  int64_t AsInteger() const { return is(Kind::kBool) ? boolean() : integer(); }
  double AsDouble() const { return is(Kind::kFloat) ? number() : static_cast<double>(AsInteger()); }
  bool IsTrue() const;
  // Levels of lists and dictionaries.
  int Depth() const;
  // "a string", "a list": for messages.
  const char* KindName() const;
  // Why this undefined value is one.
  std::string Reason() const;

 private:
  struct Missing {
    std::shared_ptr<const std::string> why;
  };
  struct NoneTag {};
  // In the order of Kind.
  using Storage =
      std::variant<Missing, NoneTag, bool, int64_t, double, std::shared_ptr<const std::string>,
                   std::shared_ptr<const List>, std::shared_ptr<const Dict>, Namespace*,
                   std::shared_ptr<const Function>, std::shared_ptr<const Loop>>;
  explicit Value(Storage storage) : storage_(std::move(storage)) {}
  Storage storage_;
};

struct List {
  std::vector<Value> items;
  ListKind kind = ListKind::kList;
  int depth = 1;
};

// In the order of insertion. Looked up one by one: messages and tools have few keys.
struct Dict {
  std::vector<std::pair<std::string, Value>> items;
  int depth = 1;
  // Null if there is none.
  const Value* Find(std::string_view key) const;
};

struct Namespace {
  std::vector<std::pair<std::string, Value>> items;
  const Value* Find(std::string_view key) const;
  void Set(const std::string& key, Value value);
};

// A name that can be called: of the language (`range`), a method of `self`, or a macro.
struct Statement;
struct Function {
  std::string name;
  Value self = {};
  bool is_method = false;
  const Statement* macro = nullptr;
};

// What `loop` stands for in the body of a for.
struct Loop {
  std::shared_ptr<const List> items;
  int64_t index = 0;  // from 0
  int64_t depth = 1;
};

// The arguments of a call, a filter or a test.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};
// The arguments in the order of `names`, undefined where they are not given. Problem for too many
// or unknown ones, or if fewer than `required` are given; `callee` for the message.
std::vector<Value> BindArguments(const Arguments& arguments,
                                 const std::vector<std::string_view>& names, size_t required,
                                 std::string_view callee);

}  // namespace winnow::chat
