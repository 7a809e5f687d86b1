// Filters of lists and dictionaries.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "chat/filter_call.h"
#include "chat/filters.h"
#include "chat/operators.h"
#include "chat/text_functions.h"
#include "chat/value_text.h"

namespace winnow::chat {
namespace {

// "a.0.b" as Jinja looks it up: each part a key or an attribute, numbers positions.
Value LookUp(const Value& value, const Value& path, Budget& budget) {
  if (path.IsWhole()) return GetItem(value, path, budget);
  if (!path.is(Kind::kString)) throw Problem("an attribute is named by a string or a number");
  Value found = value;
  for (const std::string_view part : SplitAt(path.text(), ".", -1, false)) {
    budget.UseSteps(1);
    int64_t position = 0;
    const auto read = std::from_chars(part.data(), part.data() + part.size(), position);
    const bool is_position = read.ec == std::errc() && read.ptr == part.data() + part.size();
    found = GetItem(
        found, is_position ? Value::Integer(position) : Value::String(std::string(part)), budget);
  }
  return found;
}

// Strings compare without regard to case unless the filter says otherwise.
Value Folded(const Value& value, bool case_sensitive, Budget& budget) {
  if (case_sensitive || !value.is(Kind::kString)) return value;
  budget.UseBytes(value.text().size());
  return Value::String(Lower(value.text()));
}

Value Join(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"d", "attribute"});
  const std::string separator = bound[0].is(Kind::kUndefined) ? "" : ToText(bound[0], call.budget);
  std::string text;
  bool first = true;
  for (const Value& item : Items(call.value, call.budget)) {
    if (!first) text += separator;
    first = false;
    const bool whole = bound[1].is(Kind::kUndefined) || bound[1].is(Kind::kNone);
    text += ToText(whole ? item : LookUp(item, bound[1], call.budget), call.budget);
    call.budget.UseBytes(separator.size());
  }
  return call.Result(std::move(text));
}

Value MakeList(const FilterCall& call) {
  call.Bind({});
  return Value::OfList(Items(call.value, call.budget));
}

Value First(const FilterCall& call) {
  call.Bind({});
  const std::vector<Value> items = Items(call.value, call.budget);
  return items.empty() ? Value::Undefined("there is no first item") : items.front();
}

Value Last(const FilterCall& call) {
  call.Bind({});
  const std::vector<Value> items = Items(call.value, call.budget);
  return items.empty() ? Value::Undefined("there is no last item") : items.back();
}

Value PairsOf(const FilterCall& call) {
  call.Bind({});
  return Value::OfList(Pairs(call.value, call.name, call.budget), ListKind::kGenerator);
}

Value Reverse(const FilterCall& call) {
  call.Bind({});
  std::vector<Value> items = Items(call.value, call.budget);
  std::reverse(items.begin(), items.end());
  if (!call.value.is(Kind::kString)) return Value::OfList(std::move(items), ListKind::kGenerator);
  std::string text;
  for (const Value& item : items) text += item.text();
  return call.Result(std::move(text));
}

// The first positional argument names a filter or a test, the rest is for it.
std::string TakeName(const FilterCall& call, Arguments& rest) {
  if (rest.positional.empty()) throw Problem(fmt::format("{} needs a name", call.name));
  const std::string name = call.Text(rest.positional.front());
  rest.positional.erase(rest.positional.begin());
  return name;
}

Value Map(const FilterCall& call) {
  const bool by_attribute = call.arguments.positional.empty();
  std::vector<Value> bound;
  Arguments rest = call.arguments;
  std::string name;
  if (by_attribute) {
    bound = call.Bind({"attribute", "default"});
  } else {
    name = TakeName(call, rest);
  }
  std::vector<Value> items = Items(call.value, call.budget);
  for (Value& item : items) {
    if (by_attribute) {
      item = LookUp(item, bound[0], call.budget);
      if (item.is(Kind::kUndefined) && !bound[1].is(Kind::kUndefined)) item = bound[1];
    } else {
      item = ApplyFilter(name, item, rest, call.budget);
    }
  }
  return Value::OfList(std::move(items), ListKind::kGenerator);
}

// select, reject; with an attribute: selectattr, rejectattr.
template <bool kKeep, bool kByAttribute>
Value Select(const FilterCall& call) {
  Arguments rest = call.arguments;
  Value attribute;
  if (kByAttribute) {
    if (rest.positional.empty()) throw Problem(fmt::format("{} needs an attribute", call.name));
    attribute = rest.positional.front();
    rest.positional.erase(rest.positional.begin());
  }
  const bool by_truth = rest.positional.empty();
  const std::string test = by_truth ? "" : TakeName(call, rest);
  std::vector<Value> chosen;
  for (const Value& item : Items(call.value, call.budget)) {
    const Value judged = kByAttribute ? LookUp(item, attribute, call.budget) : item;
    const bool holds = by_truth ? judged.IsTrue() : ApplyTest(test, judged, rest, call.budget);
    if (holds == kKeep) chosen.push_back(item);
  }
  return Value::OfList(std::move(chosen), ListKind::kGenerator);
}

struct KeyedItem {
  Value key, item;
};

// Stable, by keys that are made once.
void SortItems(std::vector<KeyedItem>& keyed, bool reverse, Budget& budget) {
  std::stable_sort(keyed.begin(), keyed.end(), [&](const KeyedItem& a, const KeyedItem& b) {
    return reverse ? Order(b.key, a.key, budget) < 0 : Order(a.key, b.key, budget) < 0;
  });
}

Value TakeItems(std::vector<KeyedItem>& keyed) {
  std::vector<Value> items;
  for (KeyedItem& one : keyed) items.push_back(std::move(one.item));
  return Value::OfList(std::move(items));
}

Value KeyOf(const Value& item, const Value& attribute, bool case_sensitive, Budget& budget) {
  const bool whole = attribute.is(Kind::kUndefined) || attribute.is(Kind::kNone);
  return Folded(whole ? item : LookUp(item, attribute, budget), case_sensitive, budget);
}

Value Sort(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"reverse", "case_sensitive", "attribute"});
  std::vector<KeyedItem> keyed;
  for (const Value& item : Items(call.value, call.budget)) {
    keyed.push_back({KeyOf(item, bound[2], bound[1].IsTrue(), call.budget), item});
  }
  SortItems(keyed, bound[0].IsTrue(), call.budget);
  return TakeItems(keyed);
}

Value SortDict(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"case_sensitive", "by", "reverse"});
  const std::string by = bound[1].is(Kind::kUndefined) ? "key" : call.Text(bound[1]);
  if (by != "key" && by != "value") throw Problem("dictsort sorts by \"key\" or \"value\"");
  std::vector<KeyedItem> keyed;
  for (const Value& pair : Pairs(call.value, call.name, call.budget)) {
    const Value& key = pair.list().items[by == "key" ? 0 : 1];
    keyed.push_back({Folded(key, bound[0].IsTrue(), call.budget), pair});
  }
  SortItems(keyed, bound[2].IsTrue(), call.budget);
  return TakeItems(keyed);
}

Value Unique(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"case_sensitive", "attribute"});
  std::vector<Value> seen, chosen;
  for (const Value& item : Items(call.value, call.budget)) {
    Value key = KeyOf(item, bound[1], bound[0].IsTrue(), call.budget);
    const bool is_new = std::none_of(seen.begin(), seen.end(), [&](const Value& other) {
      return Equal(key, other, call.budget);
    });
    if (!is_new) continue;
    seen.push_back(std::move(key));
    chosen.push_back(item);
  }
  return Value::OfList(std::move(chosen), ListKind::kGenerator);
}

template <bool kLargest>
Value Extreme(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"case_sensitive", "attribute"});
  std::vector<KeyedItem> keyed;
  for (const Value& item : Items(call.value, call.budget)) {
    keyed.push_back({KeyOf(item, bound[1], bound[0].IsTrue(), call.budget), item});
  }
  if (keyed.empty()) return Value::Undefined("there is no item");
  const KeyedItem* best = &keyed.front();
  for (const KeyedItem& one : keyed) {
    const int order = Order(one.key, best->key, call.budget);
    if (kLargest ? order > 0 : order < 0) best = &one;
  }
  return best->item;
}

Value Sum(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"attribute", "start"});
  Value sum = bound[1].is(Kind::kUndefined) ? Value::Integer(0) : bound[1];
  for (const Value& item : Items(call.value, call.budget)) {
    sum = Calculate(Operator::kAdd, sum, KeyOf(item, bound[0], true, call.budget), call.budget);
  }
  return sum;
}

constexpr Filter kListFilters[] = {{"join", Join},
                                   {"list", MakeList},
                                   {"first", First},
                                   {"last", Last},
                                   {"items", PairsOf},
                                   {"reverse", Reverse},
                                   {"map", Map},
                                   {"select", Select<true, false>},
                                   {"reject", Select<false, false>},
                                   {"selectattr", Select<true, true>},
                                   {"rejectattr", Select<false, true>},
                                   {"sort", Sort},
                                   {"dictsort", SortDict},
                                   {"unique", Unique},
                                   {"min", Extreme<false>},
                                   {"max", Extreme<true>},
                                   {"sum", Sum}};

}  // namespace

const Filter* FindListFilter(std::string_view name) {
  const auto* found = std::find_if(std::begin(kListFilters), std::end(kListFilters),
                                   [&](const Filter& filter) { return filter.name == name; });
  return found == std::end(kListFilters) ? nullptr : found;
}

}  // namespace winnow::chat
