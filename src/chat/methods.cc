#include "chat/methods.h"

#include <fmt/format.h>

#include <algorithm>

#include "chat/operators.h"
#include "chat/text_functions.h"
#include "chat/value_text.h"

namespace winnow::chat {
namespace {

using Names = std::vector<std::string_view>;

// What a method of strings needs: its text, bound arguments and the budget.
class StringCall {
 public:
  StringCall(const std::string& text, const std::string& name, const Arguments& arguments,
             Budget& budget)
      : text_(text), name_(name), arguments_(arguments), budget_(budget) {}

  const std::string& text() const { return text_; }
  std::vector<Value> Bind(const Names& names, size_t required = 0) const {
    return BindArguments(arguments_, names, required, name_);
  }
  void NoArguments() const { Bind({}); }
  const std::string& Text(const Value& value) const {
    if (value.is(Kind::kString)) return value.text();
    throw Problem(fmt::format("{} needs a string, got {}", name_, value.KindName()));
  }
  int64_t Whole(const Value& value, int64_t fallback) const {
    if (value.is(Kind::kUndefined)) return fallback;
    if (value.IsWhole()) return value.AsInteger();
    throw Problem(fmt::format("{} needs a whole number, got {}", name_, value.KindName()));
  }
  Value Result(std::string text) const {
    budget_.UseBytes(text.size());
    return Value::String(std::move(text));
  }
  Value Pieces(const std::vector<std::string_view>& pieces, ListKind kind) const {
    std::vector<Value> items;
    budget_.UseSteps(pieces.size());
    for (const std::string_view piece : pieces) items.push_back(Value::String(std::string(piece)));
    return Value::OfList(std::move(items), kind);
  }
  Budget& budget() const { return budget_; }

 private:
  const std::string& text_;
  const std::string& name_;
  const Arguments& arguments_;
  Budget& budget_;
};

Value StripText(const StringCall& call, StripSide side) {
  const Value characters = call.Bind({"chars"})[0];
  const bool is_default = characters.is(Kind::kUndefined) || characters.is(Kind::kNone);
  const std::string* wanted = is_default ? nullptr : &call.Text(characters);
  return call.Result(std::string(Strip(call.text(), wanted, side)));
}

Value SplitText(const StringCall& call, bool from_right) {
  const std::vector<Value> bound = call.Bind({"sep", "maxsplit"});
  const int64_t most = call.Whole(bound[1], -1);
  if (bound[0].is(Kind::kUndefined) || bound[0].is(Kind::kNone)) {
    return call.Pieces(SplitAtSpaces(call.text(), most, from_right), ListKind::kList);
  }
  const std::string& separator = call.Text(bound[0]);
  if (separator.empty()) throw Problem("split needs a separator that is not empty");
  if (from_right) call.budget().UseBytes(call.text().size() * separator.size());
  return call.Pieces(SplitAt(call.text(), separator, most, from_right), ListKind::kList);
}

Value Partition(const StringCall& call, bool from_right) {
  const Value bound = call.Bind({"sep"}, 1)[0];
  const std::string& separator = call.Text(bound);
  if (separator.empty()) throw Problem("partition needs a separator that is not empty");
  if (from_right) call.budget().UseBytes(call.text().size() * separator.size());
  const std::vector<std::string_view> pieces = SplitAt(call.text(), separator, 1, from_right);
  if (pieces.size() == 2) {
    return call.Pieces({pieces[0], separator, pieces[1]}, ListKind::kTuple);
  }
  return call.Pieces(from_right ? std::vector<std::string_view>{"", "", call.text()}
                                : std::vector<std::string_view>{call.text(), "", ""},
                     ListKind::kTuple);
}

// startswith, endswith: with one string or several in a tuple.
Value HasEnd(const StringCall& call, bool at_start) {
  const Value bound = call.Bind({"prefix"}, 1)[0];
  const auto matches = [&](const Value& part) {
    const std::string& wanted = call.Text(part);
    return at_start ? call.text().starts_with(wanted) : call.text().ends_with(wanted);
  };
  if (!bound.is(Kind::kList)) return Value::Bool(matches(bound));
  const std::vector<Value>& items = bound.list().items;
  call.budget().UseSteps(items.size());
  return Value::Bool(std::any_of(items.begin(), items.end(), matches));
}

Value RemoveEnd(const StringCall& call, bool at_start) {
  const Value bound = call.Bind({"prefix"}, 1)[0];
  const std::string& wanted = call.Text(bound);
  const std::string& text = call.text();
  const bool has = at_start ? text.starts_with(wanted) : text.ends_with(wanted);
  if (!has) return call.Result(text);
  return call.Result(at_start ? text.substr(wanted.size())
                              : text.substr(0, text.size() - wanted.size()));
}

Value Find(const StringCall& call, bool from_right) {
  const Value bound = call.Bind({"sub"}, 1)[0];
  const std::string& wanted = call.Text(bound);
  if (from_right) call.budget().UseBytes(call.text().size() * (wanted.size() + 1));
  const size_t at = from_right ? call.text().rfind(wanted) : FindText(call.text(), wanted);
  if (at == std::string::npos) return Value::Integer(-1);
  return Value::Integer(CountCharacters(std::string_view(call.text()).substr(0, at)));
}

uint64_t CountText(const std::string& text, const std::string& wanted) {
  if (wanted.empty()) return static_cast<uint64_t>(CountCharacters(text)) + 1;
  uint64_t count = 0;
  for (size_t at = 0; (at = FindText(text, wanted, at)) != std::string_view::npos; ++count) {
    at += wanted.size();
  }
  return count;
}

Value Count(const StringCall& call) {
  const Value bound = call.Bind({"sub"}, 1)[0];
  return Value::Integer(static_cast<int64_t>(CountText(call.text(), call.Text(bound))));
}

Value Replace(const StringCall& call) {
  const std::vector<Value> bound = call.Bind({"old", "new", "count"}, 2);
  const std::string &old = call.Text(bound[0]), &with = call.Text(bound[1]);
  // Counted before it is made: one letter may become a long text.
  call.budget().UseBytes(call.text().size() + CountText(call.text(), old) * with.size());
  return Value::String(ReplaceText(call.text(), old, with, call.Whole(bound[2], -1)));
}

Value Join(const StringCall& call) {
  const Value bound = call.Bind({"iterable"}, 1)[0];
  std::string text;
  bool first = true;
  for (const Value& item : Items(bound, call.budget())) {
    if (!first) text += call.text();
    first = false;
    text += call.Text(item);
    call.budget().UseBytes(call.text().size() + item.text().size());
  }
  return Value::String(std::move(text));
}

Value SplitTextLines(const StringCall& call) {
  const Value keep = call.Bind({"keepends"})[0];
  return call.Pieces(SplitLines(call.text(), keep.IsTrue()), ListKind::kList);
}

template <std::string (*kFunction)(std::string_view)>
Value Mapped(const StringCall& call) {
  call.NoArguments();
  return call.Result(kFunction(call.text()));
}

template <CharacterClass kClass>
Value Classified(const StringCall& call) {
  call.NoArguments();
  return Value::Bool(IsAll(call.text(), kClass));
}

template <bool (*kFunction)(std::string_view)>
Value Judged(const StringCall& call) {
  call.NoArguments();
  return Value::Bool(kFunction(call.text()));
}

struct StringMethod {
  std::string_view name;
  Value (*call)(const StringCall&);
};
constexpr StringMethod kStringMethods[] = {
    {"strip", [](const StringCall& c) { return StripText(c, StripSide::kBoth); }},
    {"lstrip", [](const StringCall& c) { return StripText(c, StripSide::kLeft); }},
    {"rstrip", [](const StringCall& c) { return StripText(c, StripSide::kRight); }},
    {"split", [](const StringCall& c) { return SplitText(c, false); }},
    {"rsplit", [](const StringCall& c) { return SplitText(c, true); }},
    {"splitlines", SplitTextLines},
    {"partition", [](const StringCall& c) { return Partition(c, false); }},
    {"rpartition", [](const StringCall& c) { return Partition(c, true); }},
    {"startswith", [](const StringCall& c) { return HasEnd(c, true); }},
    {"endswith", [](const StringCall& c) { return HasEnd(c, false); }},
    {"removeprefix", [](const StringCall& c) { return RemoveEnd(c, true); }},
    {"removesuffix", [](const StringCall& c) { return RemoveEnd(c, false); }},
    {"find", [](const StringCall& c) { return Find(c, false); }},
    {"rfind", [](const StringCall& c) { return Find(c, true); }},
    {"count", Count},
    {"replace", Replace},
    {"join", Join},
    {"upper", Mapped<Upper>},
    {"lower", Mapped<Lower>},
    {"title", Mapped<Title>},
    {"capitalize", Mapped<Capitalize>},
    {"isalpha", Classified<CharacterClass::kAlpha>},
    {"isdigit", Classified<CharacterClass::kDigit>},
    {"isalnum", Classified<CharacterClass::kAlphanumeric>},
    {"isspace", Classified<CharacterClass::kSpace>},
    {"isupper", Judged<IsUpper>},
    {"islower", Judged<IsLower>}};

constexpr std::string_view kRefusedStringMethods[] = {
    "casefold",  "center",    "encode",    "expandtabs",   "format",      "format_map", "index",
    "isascii",   "isdecimal", "isnumeric", "isidentifier", "isprintable", "istitle",    "ljust",
    "maketrans", "rindex",    "rjust",     "swapcase",     "translate",   "zfill"};
constexpr std::string_view kDictMethods[] = {"items", "keys", "values", "get", "copy"};
constexpr std::string_view kListMethods[] = {"index", "count", "copy"};
// Refused by transformers as well: a template must not change what it is given.
constexpr std::string_view kChangingMethods[] = {"append",     "clear",  "extend",  "insert",
                                                 "pop",        "remove", "reverse", "sort",
                                                 "setdefault", "update", "popitem"};

const StringMethod* FindStringMethod(std::string_view name) {
  const auto* found = std::find_if(std::begin(kStringMethods), std::end(kStringMethods),
                                   [&](const StringMethod& m) { return m.name == name; });
  return found == std::end(kStringMethods) ? nullptr : found;
}

template <size_t kCount>
bool IsOneOf(const std::string_view (&names)[kCount], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

Value CallDictMethod(const Value& self, const std::string& name, const Arguments& arguments,
                     Budget& budget) {
  if (name == "get") {
    const std::vector<Value> bound = BindArguments(arguments, {"key", "default"}, 1, name);
    budget.UseSteps(self.dict().items.size() / 8);
    const Value* found = bound[0].is(Kind::kString) ? self.dict().Find(bound[0].text()) : nullptr;
    if (found != nullptr) return *found;
    const bool has_default = arguments.positional.size() + arguments.named.size() > 1;
    return has_default ? bound[1] : Value::None();
  }
  BindArguments(arguments, {}, 0, name);
  if (name == "copy") return self;
  if (name == "items") return Value::OfList(Pairs(self, name, budget));
  if (name == "keys") return Value::OfList(Items(self, budget));
  budget.UseSteps(self.dict().items.size());
  std::vector<Value> values;
  for (const auto& [key, value] : self.dict().items) values.push_back(value);
  return Value::OfList(std::move(values));
}

Value CallListMethod(const Value& self, const std::string& name, const Arguments& arguments,
                     Budget& budget) {
  if (name == "copy") {
    BindArguments(arguments, {}, 0, name);
    return self;
  }
  const Value wanted = BindArguments(arguments, {"value"}, 1, name)[0];
  int64_t count = 0;
  const std::vector<Value>& items = self.list().items;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!Equal(items[i], wanted, budget)) continue;
    if (name == "index") return Value::Integer(static_cast<int64_t>(i));
    ++count;
  }
  if (name == "index") throw Problem("index: the value is not in the list");
  return Value::Integer(count);
}

}  // namespace

bool IsMethod(const Value& value, const std::string& name) {
  switch (value.kind()) {
    case Kind::kString:
      return FindStringMethod(name) != nullptr;
    case Kind::kDict:
      return IsOneOf(kDictMethods, name);
    case Kind::kList:
      return value.list().kind != ListKind::kGenerator && IsOneOf(kListMethods, name);
    default:
      return false;
  }
}

bool IsRefusedMethod(const Value& value, const std::string& name) {
  if (value.is(Kind::kString)) return IsOneOf(kRefusedStringMethods, name);
  return (value.is(Kind::kList) || value.is(Kind::kDict)) && IsOneOf(kChangingMethods, name);
}

Value CallMethod(const Value& self, const std::string& name, const Arguments& arguments,
                 Budget& budget) {
  if (self.is(Kind::kDict)) return CallDictMethod(self, name, arguments, budget);
  if (self.is(Kind::kList)) return CallListMethod(self, name, arguments, budget);
  budget.UseBytes(self.text().size());
  return FindStringMethod(name)->call(StringCall(self.text(), name, arguments, budget));
}

}  // namespace winnow::chat
