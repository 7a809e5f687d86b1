#include "chat/value_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "chat/text_functions.h"
#include "tokenizer/utf8.h"

namespace winnow::chat {
namespace {

// repr(str): single quotes unless only they occur; what cannot be printed is escaped.
void AppendQuoted(const std::string& text, std::string& out) {
  const bool has_single = text.find('\'') != std::string::npos;
  const char quote = has_single && text.find('"') == std::string::npos ? '"' : '\'';
  out += quote;
  for (size_t at = 0; at < text.size();) {
    const tok::Char c = tok::CharAt(text, at);
    at += c.bytes;
    if (c.code == U'\n') {
      out += "\\n";
    } else if (c.code == U'\r') {
      out += "\\r";
    } else if (c.code == U'\t') {
      out += "\\t";
    } else if (c.code == U'\\' || c.code == static_cast<char32_t>(quote)) {
      out += '\\';
      out += static_cast<char>(c.code);
    } else if (IsPrintable(c.code)) {
      tok::AppendUtf8(c.code, out);
    } else if (c.code < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c.code));
    } else if (c.code < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c.code));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<uint32_t>(c.code));
    }
  }
  out += quote;
}

void AppendJsonString(const std::string& text, bool ensure_ascii, std::string& out) {
  out += '"';
  for (size_t at = 0; at < text.size();) {
    const tok::Char c = tok::CharAt(text, at);
    at += c.bytes;
    static constexpr std::string_view kEscaped = "\"\\\n\r\t\b\f";
    static constexpr std::string_view kLetters = "\"\\nrtbf";
    const size_t known =
        c.code < 0x80 ? kEscaped.find(static_cast<char>(c.code)) : std::string_view::npos;
    if (known != std::string_view::npos) {
      out += '\\';
      out += kLetters[known];
    } else if (c.code < 0x20 || (ensure_ascii && c.code >= 0x7F && c.code < 0x10000)) {
      // 0x7F is ASCII and stays as it is.
      out += c.code == 0x7F ? "\x7f" : fmt::format("\\u{:04x}", static_cast<uint32_t>(c.code));
    } else if (ensure_ascii && c.code >= 0x10000) {
      const uint32_t rest = static_cast<uint32_t>(c.code) - 0x10000;
      out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (rest >> 10), 0xDC00 + (rest & 0x3FF));
    } else {
      tok::AppendUtf8(c.code, out);
    }
  }
  out += '"';
}

class Printer {
 public:
  explicit Printer(Budget& budget) : budget_(budget) {}

  void Append(const Value& value, bool quoted) {
    budget_.UseSteps(1);
    const size_t before = out_.size();
    switch (value.kind()) {
      case Kind::kUndefined:
        if (quoted) out_ += "Undefined";
        break;
      case Kind::kNone:
        out_ += "None";
        break;
      case Kind::kBool:
        out_ += value.boolean() ? "True" : "False";
        break;
      case Kind::kInteger:
        out_ += std::to_string(value.integer());
        break;
      case Kind::kFloat:
        out_ += FloatText(value.number());
        break;
      case Kind::kString:
        quoted ? AppendQuoted(value.text(), out_) : void(out_ += value.text());
        break;
      case Kind::kList:
        AppendList(value.list());
        return;  // counted item by item
      case Kind::kDict:
        AppendDict(value.dict());
        return;
      default:
        throw Problem(fmt::format("{} cannot be printed", value.KindName()));
    }
    budget_.UseBytes(out_.size() - before);
  }
  std::string Take() { return std::move(out_); }

 private:
  void AppendList(const List& list) {
    if (list.kind == ListKind::kGenerator) {
      throw Problem("the result of a filter is printed before it is made a list");
    }
    const bool is_tuple = list.kind == ListKind::kTuple;
    out_ += is_tuple ? '(' : '[';
    for (size_t i = 0; i < list.items.size(); ++i) {
      if (i > 0) out_ += ", ";
      Append(list.items[i], true);
    }
    if (is_tuple && list.items.size() == 1) out_ += ',';
    out_ += is_tuple ? ')' : ']';
  }
  void AppendDict(const Dict& dict) {
    out_ += '{';
    for (size_t i = 0; i < dict.items.size(); ++i) {
      if (i > 0) out_ += ", ";
      AppendQuoted(dict.items[i].first, out_);
      out_ += ": ";
      Append(dict.items[i].second, true);
    }
    out_ += '}';
  }
  Budget& budget_;
  std::string out_;
};

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, Budget& budget) : style_(style), budget_(budget) {}

  void Append(const Value& value) {
    budget_.UseSteps(1);
    const size_t before = out_.size();
    switch (value.kind()) {
      case Kind::kNone:
        out_ += "null";
        break;
      case Kind::kBool:
        out_ += value.boolean() ? "true" : "false";
        break;
      case Kind::kInteger:
        out_ += std::to_string(value.integer());
        break;
      case Kind::kFloat:
        AppendNumber(value.number());
        break;
      case Kind::kString:
        AppendJsonString(value.text(), style_.ensure_ascii, out_);
        break;
      case Kind::kList:
        AppendList(value.list());
        return;
      case Kind::kDict:
        AppendDict(value.dict());
        return;
      default:
        throw Problem(fmt::format("tojson: {} cannot be written as JSON", value.KindName()));
    }
    budget_.UseBytes(out_.size() - before);
  }
  std::string Take() { return std::move(out_); }

 private:
  void AppendNumber(double number) {
    if (std::isnan(number)) {
      out_ += "NaN";
    } else if (std::isinf(number)) {
      out_ += number > 0 ? "Infinity" : "-Infinity";
    } else {
      out_ += FloatText(number);
    }
  }
  void BreakLine() {
    if (!style_.indent) return;
    out_ += '\n';
    budget_.UseBytes(level_ * style_.indent->size());
    for (size_t i = 0; i < level_; ++i) out_ += *style_.indent;
  }
  void AppendList(const List& list) {
    if (list.kind == ListKind::kGenerator) {
      throw Problem("tojson: the result of a filter is written before it is made a list");
    }
    if (list.items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    ++level_;
    for (size_t i = 0; i < list.items.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      BreakLine();
      Append(list.items[i]);
    }
    --level_;
    BreakLine();
    out_ += ']';
  }
  void AppendDict(const Dict& dict) {
    if (dict.items.empty()) {
      out_ += "{}";
      return;
    }
    std::vector<const std::pair<std::string, Value>*> items;
    for (const auto& item : dict.items) items.push_back(&item);
    if (style_.sort_keys) {
      std::sort(items.begin(), items.end(),
                [](const auto* a, const auto* b) { return a->first < b->first; });
    }
    out_ += '{';
    ++level_;
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      BreakLine();
      AppendJsonString(items[i]->first, style_.ensure_ascii, out_);
      out_ += style_.key_separator;
      Append(items[i]->second);
    }
    --level_;
    BreakLine();
    out_ += '}';
  }
  const JsonStyle& style_;
  Budget& budget_;
  std::string out_;
  size_t level_ = 0;
};

}  // namespace

std::string ToText(const Value& value, Budget& budget) {
  Printer printer(budget);
  printer.Append(value, false);
  return printer.Take();
}

std::string ToJson(const Value& value, const JsonStyle& style, Budget& budget) {
  JsonWriter writer(style, budget);
  writer.Append(value);
  return writer.Take();
}

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto written =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  const std::string_view text(buffer, static_cast<size_t>(written.ptr - buffer));
  const size_t e = text.find('e');
  const int exponent = std::stoi(std::string(text.substr(e + 1)));
  if (exponent < -4 || exponent >= 16) return std::string(text);  // 1e+16, 1.5e-07 as Python
  std::string digits;
  for (const char c : text.substr(0, e)) {
    if (c != '-' && c != '.') digits += c;
  }
  std::string result = value < 0 || std::signbit(value) ? "-" : "";
  if (exponent < 0) {
    return result + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  }
  const auto whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= whole) {
    return result + digits + std::string(whole - digits.size(), '0') + ".0";
  }
  return result + digits.substr(0, whole) + "." + digits.substr(whole);
}

}  // namespace winnow::chat
