// Filters of text and numbers, and the table of all filters.
#include "chat/filters.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "chat/filter_call.h"
#include "chat/methods.h"
#include "chat/operators.h"
#include "chat/text_functions.h"
#include "chat/value_text.h"
#include "tokenizer/utf8.h"

namespace winnow::chat {

const std::string& FilterCall::Text(const Value& text) const {
  if (text.is(Kind::kString)) return text.text();
  if (text.is(Kind::kUndefined)) throw Problem(text.Reason());
  throw Problem(fmt::format("{} needs a string, got {}", name, text.KindName()));
}

int64_t FilterCall::Whole(const Value& whole, int64_t fallback) const {
  if (whole.is(Kind::kUndefined)) return fallback;
  if (whole.IsWhole()) return whole.AsInteger();
  throw Problem(fmt::format("{} needs a whole number, got {}", name, whole.KindName()));
}

std::string FilterCall::AsText() const {
  return ToText(value, budget);
}

Value FilterCall::Result(std::string text) const {
  budget.UseBytes(text.size());
  return Value::String(std::move(text));
}

namespace {

Value Trim(const FilterCall& call) {
  const Value characters = call.Bind({"chars"})[0];
  const bool is_default = characters.is(Kind::kUndefined) || characters.is(Kind::kNone);
  const std::string text = call.AsText();
  return call.Result(
      std::string(Strip(text, is_default ? nullptr : &call.Text(characters), StripSide::kBoth)));
}

Value DumpAsJson(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = bound[0].IsTrue();
  style.sort_keys = bound[3].IsTrue();
  if (bound[1].is(Kind::kString)) {
    style.indent = bound[1].text();
  } else if (!bound[1].is(Kind::kNone) && !bound[1].is(Kind::kUndefined)) {
    const int64_t width = std::clamp<int64_t>(call.Whole(bound[1], 0), 0, 1000);
    style.indent = std::string(static_cast<size_t>(width), ' ');
  }
  if (style.indent) style.item_separator = ",";
  if (bound[2].is(Kind::kList)) {
    const std::vector<Value>& separators = bound[2].list().items;
    if (separators.size() != 2) throw Problem("tojson: separators are not two strings");
    style.item_separator = call.Text(separators[0]);
    style.key_separator = call.Text(separators[1]);
  }
  return Value::String(ToJson(call.value, style, call.budget));
}

Value Default(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"default_value", "boolean"});
  const bool is_missing =
      call.value.is(Kind::kUndefined) || (bound[1].IsTrue() && !call.value.IsTrue());
  if (!is_missing) return call.value;
  const bool is_given = !call.arguments.positional.empty() ||
                        std::any_of(call.arguments.named.begin(), call.arguments.named.end(),
                                    [](const auto& one) { return one.first == "default_value"; });
  return is_given ? bound[0] : Value::String("");
}

Value Replace(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"old", "new", "count"}, 2);
  const Value text = Value::String(call.AsText());
  Arguments arguments{
      {Value::String(ToText(bound[0], call.budget)), Value::String(ToText(bound[1], call.budget))},
      {}};
  if (bound[2].IsWhole()) arguments.positional.push_back(bound[2]);
  return CallMethod(text, "replace", arguments, call.budget);
}

Value Indent(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"width", "first", "blank"});
  const std::string margin =
      bound[0].is(Kind::kString)
          ? bound[0].text()
          : std::string(static_cast<size_t>(std::clamp<int64_t>(call.Whole(bound[0], 4), 0, 1000)),
                        ' ');
  const std::string text = call.AsText() + "\n";  // as Jinja: a last line break counts as a line
  const std::vector<std::string_view> lines = SplitLines(text, false);
  std::string result;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) result += '\n';
    const bool is_indented = i == 0 ? bound[1].IsTrue() : bound[2].IsTrue() || !lines[i].empty();
    if (is_indented) {
      call.budget.UseBytes(margin.size());
      result += margin;
    }
    result += lines[i];
  }
  return call.Result(std::move(result));
}

template <std::string (*kFunction)(std::string_view)>
Value Mapped(const FilterCall& call) {
  call.Bind({});
  return call.Result(kFunction(call.AsText()));
}

// Jinja's own: words begin after spaces, hyphens and opening brackets, not after apostrophes.
std::string TitleWords(std::string_view text) {
  const std::u32string_view openers = U"-({[<";
  std::string result;
  std::string word;
  for (size_t at = 0; at < text.size();) {
    const tok::Char c = tok::CharAt(text, at);
    const std::string_view character = text.substr(at, c.bytes);
    at += c.bytes;
    if (!IsPythonSpace(c.code) && openers.find(c.code) == std::u32string_view::npos) {
      word += character;
      continue;
    }
    result += Capitalize(word);
    word.clear();
    result += character;
  }
  return result + Capitalize(word);
}

Value ToInteger(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"default", "base"});
  const Value fallback = bound[0].is(Kind::kUndefined) ? Value::Integer(0) : bound[0];
  const Value& value = call.value;
  if (value.IsWhole()) return Value::Integer(value.AsInteger());
  double number = 0;
  if (value.is(Kind::kFloat)) {
    number = value.number();
  } else if (value.is(Kind::kString)) {
    std::string_view text = Strip(value.text(), nullptr, StripSide::kBoth);
    if (text.starts_with('+')) text.remove_prefix(1);
    int64_t whole = 0;
    const int64_t base = std::clamp<int64_t>(call.Whole(bound[1], 10), 2, 36);
    const char* end = text.data() + text.size();
    const auto read = std::from_chars(text.data(), end, whole, static_cast<int>(base));
    if (read.ec == std::errc() && read.ptr == end) return Value::Integer(whole);
    const auto fraction = std::from_chars(text.data(), end, number);
    if (fraction.ec != std::errc() || fraction.ptr != end) return fallback;
  } else {
    return fallback;
  }
  if (!(std::abs(number) < 9e18)) return fallback;
  return Value::Integer(static_cast<int64_t>(number));
}

Value ToFloat(const FilterCall& call) {
  const Value bound = call.Bind({"default"})[0];
  if (call.value.IsNumber()) return Value::Float(call.value.AsDouble());
  if (call.value.is(Kind::kString)) {
    std::string_view text = Strip(call.value.text(), nullptr, StripSide::kBoth);
    if (text.starts_with('+')) text.remove_prefix(1);
    double number = 0;
    const char* end = text.data() + text.size();
    const auto read = std::from_chars(text.data(), end, number);
    if (read.ec == std::errc() && read.ptr == end) return Value::Float(number);
  }
  return bound.is(Kind::kUndefined) ? Value::Float(0) : bound;
}

Value Absolute(const FilterCall& call) {
  call.Bind({});
  if (!call.value.IsNumber()) {
    throw Problem(fmt::format("abs needs a number, got {}", call.value.KindName()));
  }
  if (call.value.is(Kind::kFloat)) return Value::Float(std::abs(call.value.number()));
  return call.value.AsInteger() < 0 ? Negate(call.value) : Value::Integer(call.value.AsInteger());
}

Value Round(const FilterCall& call) {
  const std::vector<Value> bound = call.Bind({"precision", "method"});
  const int64_t precision = std::clamp<int64_t>(call.Whole(bound[0], 0), -300, 300);
  const std::string method = bound[1].is(Kind::kUndefined) ? "common" : call.Text(bound[1]);
  if (!call.value.IsNumber()) {
    throw Problem(fmt::format("round needs a number, got {}", call.value.KindName()));
  }
  const double number = call.value.AsDouble();
  const double scale = std::pow(10.0, static_cast<double>(precision));
  if (method == "ceil") return Value::Float(std::ceil(number * scale) / scale);
  if (method == "floor") return Value::Float(std::floor(number * scale) / scale);
  if (method != "common") throw Problem(fmt::format("round: no method \"{}\"", method));
  if (!std::isfinite(number) || precision < 0) {
    return Value::Float(std::nearbyint(number * scale) / scale);
  }
  // Through decimal digits, as Python: 2.675 is below 2.675 and goes down.
  double rounded = 0;
  const std::string digits = fmt::format("{:.{}f}", number, precision);
  std::from_chars(digits.data(), digits.data() + digits.size(), rounded);
  return Value::Float(rounded);
}

Value WordCount(const FilterCall& call) {
  call.Bind({});
  const std::string text = call.AsText();
  return Value::Integer(std::ssize(SplitAtSpaces(text, -1, false)));
}

Value CountOf(const FilterCall& call) {
  call.Bind({});
  return Value::Integer(Length(call.value, call.budget));
}

Value AsString(const FilterCall& call) {
  call.Bind({});
  return Value::String(call.AsText());
}

constexpr Filter kFilters[] = {{"trim", Trim},
                               {"tojson", DumpAsJson},
                               {"default", Default},
                               {"d", Default},
                               {"replace", Replace},
                               {"indent", Indent},
                               {"upper", Mapped<Upper>},
                               {"lower", Mapped<Lower>},
                               {"capitalize", Mapped<Capitalize>},
                               {"title", Mapped<TitleWords>},
                               {"length", CountOf},
                               {"count", CountOf},
                               {"wordcount", WordCount},
                               {"string", AsString},
                               {"safe", AsString},
                               {"int", ToInteger},
                               {"float", ToFloat},
                               {"abs", Absolute},
                               {"round", Round}};

const Filter* FindFilter(std::string_view name) {
  const auto* found = std::find_if(std::begin(kFilters), std::end(kFilters),
                                   [&](const Filter& filter) { return filter.name == name; });
  return found == std::end(kFilters) ? FindListFilter(name) : found;
}

}  // namespace

bool IsFilter(std::string_view name) {
  return FindFilter(name) != nullptr;
}

Value ApplyFilter(const std::string& name, const Value& value, const Arguments& arguments,
                  Budget& budget) {
  const Filter* filter = FindFilter(name);
  if (filter == nullptr) throw Problem(fmt::format("filter \"{}\" is not supported", name));
  budget.UseSteps(1);
  return filter->apply({name, value, arguments, budget});
}

}  // namespace winnow::chat
