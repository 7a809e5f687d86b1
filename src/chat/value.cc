#include "chat/value.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "tokenizer/utf8.h"

namespace winnow::chat {
namespace {

void CheckDepth(int depth) {
  if (depth > kMaxValueDepth) {
    throw Problem(fmt::format("a value is nested deeper than {} levels", kMaxValueDepth));
  }
}

template <class Items>
const Value* FindIn(const Items& items, std::string_view key) {
  const auto found =
      std::find_if(items.begin(), items.end(), [&](const auto& item) { return item.first == key; });
  return found == items.end() ? nullptr : &found->second;
}

std::string ValidText(const std::string& text) {
  if (tok::ValidUtf8Prefix(text) == text.size()) return text;
  std::string repaired;
  tok::AppendLossyUtf8(text, repaired);
  return repaired;
}

}  // namespace

Value Value::Undefined(std::string why) {
  return Value(Storage(Missing{std::make_shared<const std::string>(std::move(why))}));
}

Value Value::String(std::string text) {
  return Value(Storage(std::make_shared<const std::string>(std::move(text))));
}

Value Value::OfList(std::vector<Value> items, ListKind kind) {
  auto list = std::make_shared<List>();
  for (const Value& item : items) list->depth = std::max(list->depth, item.Depth() + 1);
  CheckDepth(list->depth);
  list->items = std::move(items);
  list->kind = kind;
  return Value(Storage(std::shared_ptr<const List>(std::move(list))));
}

Value Value::OfDict(std::vector<std::pair<std::string, Value>> items) {
  auto dict = std::make_shared<Dict>();
  for (const auto& [key, item] : items) dict->depth = std::max(dict->depth, item.Depth() + 1);
  CheckDepth(dict->depth);
  dict->items = std::move(items);
  return Value(Storage(std::shared_ptr<const Dict>(std::move(dict))));
}

Value Value::OfFunction(Function function) {
  return Value(Storage(std::make_shared<const Function>(std::move(function))));
}

Value Value::FromJson(const OrderedJson& json) {
  switch (json.type()) {
    case OrderedJson::value_t::boolean:
      return Bool(json.get<bool>());
    case OrderedJson::value_t::number_unsigned:
      if (json.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
        return Float(json.get<double>());
      }
      return Integer(json.get<int64_t>());
    case OrderedJson::value_t::number_integer:
      return Integer(json.get<int64_t>());
    case OrderedJson::value_t::number_float:
      return Float(json.get<double>());
    case OrderedJson::value_t::string:
      return String(ValidText(json.get_ref<const std::string&>()));
    case OrderedJson::value_t::array: {
      std::vector<Value> items;
      for (const OrderedJson& item : json) items.push_back(FromJson(item));
      return OfList(std::move(items));
    }
    case OrderedJson::value_t::object: {
      std::vector<std::pair<std::string, Value>> items;
      for (const auto& [key, item] : json.items()) {
        items.emplace_back(ValidText(key), FromJson(item));
      }
      return OfDict(std::move(items));
    }
    default:
      return None();
  }
}

bool Value::IsTrue() const {
  switch (kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
      return boolean();
    case Kind::kInteger:
      return integer() != 0;
    case Kind::kFloat:
      return number() != 0;
    case Kind::kString:
      return !text().empty();
    case Kind::kList:
      return list().kind == ListKind::kGenerator || !list().items.empty();
    case Kind::kDict:
      return !dict().items.empty();
    default:
      return true;
  }
}

int Value::Depth() const {
  switch (kind()) {
    case Kind::kList:
      return list().depth;
    case Kind::kDict:
      return dict().depth;
    case Kind::kFunction:  // a method keeps what it belongs to
      return function().self.Depth() + 1;
    case Kind::kLoop:
      return loop().items->depth + 1;
    default:
      return 0;
  }
}

const char* Value::KindName() const {
  static constexpr const char* kNames[] = {"undefined",   "none",       "a boolean", "an integer",
                                           "a number",    "a string",   "a list",    "a dictionary",
                                           "a namespace", "a function", "a loop"};
  return kNames[storage_.index()];
}

std::string Value::Reason() const {
  const auto& why = std::get<Missing>(storage_).why;
  return why == nullptr ? "a value is undefined" : *why;
}

const Value* Dict::Find(std::string_view key) const {
  return FindIn(items, key);
}

const Value* Namespace::Find(std::string_view key) const {
  return FindIn(items, key);
}

void Namespace::Set(const std::string& key, Value value) {
  for (auto& [name, old] : items) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  items.emplace_back(key, std::move(value));
}

std::vector<Value> BindArguments(const Arguments& arguments,
                                 const std::vector<std::string_view>& names, size_t required,
                                 std::string_view callee) {
  if (arguments.positional.size() > names.size()) {
    throw Problem(fmt::format("{} takes at most {} arguments, {} are given", callee, names.size(),
                              arguments.positional.size()));
  }
  std::vector<Value> bound(arguments.positional);
  bound.resize(names.size());
  std::vector<bool> given(names.size(), false);
  std::fill_n(given.begin(), arguments.positional.size(), true);
  for (const auto& [name, value] : arguments.named) {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) {
      throw Problem(fmt::format("{} has no argument \"{}\"", callee, name));
    }
    const auto at = static_cast<size_t>(found - names.begin());
    if (given[at]) throw Problem(fmt::format("{}: argument \"{}\" is given twice", callee, name));
    given[at] = true;
    bound[at] = value;
  }
  for (size_t i = 0; i < required; ++i) {
    if (!given[i]) throw Problem(fmt::format("{} needs the argument \"{}\"", callee, names[i]));
  }
  return bound;
}

}  // namespace winnow::chat
