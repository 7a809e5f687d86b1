#include "chat/lexer.h"

#include <fmt/format.h>

#include <algorithm>

#include "chat/problem.h"
#include "chat/text_functions.h"
#include "tokenizer/utf8.h"

namespace winnow::chat {
namespace {

bool IsDigit(char c) {
  return c >= '0' && c <= '9';
}
bool IsNameStart(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
bool IsNamePart(char c) {
  return IsNameStart(c) || IsDigit(c);
}

// One kind of line break, and none at the very end.
std::string NormaliseLines(std::string_view source) {
  std::string text;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      text += source[i];
      continue;
    }
    text += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(NormaliseLines(source)), rest_(source_) {}

  std::vector<Token> Run() {
    while (at_ < source_.size()) ReadText();
    Add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void Fail(const std::string& what) const { throw Problem(what, LineAt(at_)); }
  int LineAt(size_t position) const {
    while (counted_ < std::min(position, source_.size())) {
      if (source_[counted_++] == '\n') ++line_;
    }
    return line_;
  }
  void Add(TokenKind kind, std::string text) {
    tokens_.push_back({kind, std::move(text), LineAt(at_)});
  }
  bool Sees(std::string_view what) const { return rest_.substr(at_).starts_with(what); }
  void SkipSpaces() {
    while (at_ < source_.size()) {
      const tok::Char c = tok::CharAt(source_, at_);
      if (!IsPythonSpace(c.code)) return;
      at_ += c.bytes;
    }
  }

  // Text up to the next tag, and the tag.
  void ReadText() {
    size_t tag = at_;
    while ((tag = source_.find('{', tag)) != std::string::npos) {
      const char next = tag + 1 < source_.size() ? source_[tag + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') break;
      ++tag;
    }
    if (tag == std::string::npos) {
      const std::string_view text = rest_.substr(at_);
      Add(TokenKind::kText, std::string(text));
      at_ = source_.size();
      return;
    }
    AddTextBefore(tag);
    switch (source_[tag + 1]) {
      case '#':
        return SkipComment();
      case '%':
        if (ReadRaw()) return;
        Add(TokenKind::kBlockBegin, "");
        return ReadTag(TokenKind::kBlockEnd);
      default:
        Add(TokenKind::kPrintBegin, "");
        return ReadTag(TokenKind::kPrintEnd);
    }
  }

  // Emits the text up to `tag`, stripped as the tag demands, and moves behind the tag's opening.
  void AddTextBefore(size_t tag) {
    std::string_view text = rest_.substr(at_, tag - at_);
    const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    if (sign == '-') {
      text = Strip(text, nullptr, StripSide::kRight);
    } else if (sign != '+' && source_[tag + 1] != '{') {
      const size_t newline = text.rfind('\n');
      const size_t line = newline == std::string_view::npos ? 0 : newline + 1;
      const bool begins_line = line > 0 || line_starts_;
      if (begins_line && Strip(text.substr(line), nullptr, StripSide::kRight).empty()) {
        text = text.substr(0, line);
      }
    }
    if (!text.empty()) Add(TokenKind::kText, std::string(text));
    at_ = tag + (sign == '-' || sign == '+' ? 3 : 2);
    line_starts_ = false;
  }

  // Behind the end of a tag. `sign`: what stood before it; `trims`: a line break after it goes.
  void EndTag(char sign, bool trims) {
    const size_t begin = at_;
    if (sign == '-') {
      SkipSpaces();
    } else if (trims && sign != '+' && Sees("\n")) {
      ++at_;
    }
    line_starts_ = at_ > begin && source_[at_ - 1] == '\n';
  }

  void SkipComment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string::npos) Fail("a comment has no end");
    const char sign = end > at_ ? source_[end - 1] : '\0';
    at_ = end + 2;
    EndTag(sign, true);
  }

  // {% raw %} ... {% endraw %}: text without tags.
  bool ReadRaw() {
    const size_t begin = at_;
    SkipSpaces();
    const bool is_raw = Sees("raw") && (at_ + 3 >= source_.size() || !IsNamePart(source_[at_ + 3]));
    if (is_raw) {
      at_ += 3;
      SkipSpaces();
      const char sign = Sees("-%}") ? '-' : '\0';
      if (Sees("-%}") || Sees("%}")) {
        at_ += sign == '-' ? 3 : 2;
        EndTag(sign, false);
        ReadRawText();
        return true;
      }
    }
    at_ = begin;
    return false;
  }

  void ReadRawText() {
    for (size_t tag = at_; (tag = source_.find("{%", tag)) != std::string::npos; ++tag) {
      const size_t start = at_;
      at_ = tag + 2;
      if (Sees("-") || Sees("+")) ++at_;
      SkipSpaces();
      if (Sees("endraw")) {
        at_ += 6;
        SkipSpaces();
        const char sign = Sees("-%}") ? '-' : Sees("+%}") ? '+' : '\0';
        const size_t end = at_ + (sign == '\0' ? 0 : 1);
        if (rest_.substr(end).starts_with("%}")) {
          at_ = start;
          AddTextBefore(tag);
          at_ = end + 2;
          return EndTag(sign, true);
        }
      }
      at_ = start;
    }
    Fail("raw has no endraw");
  }

  void ReadTag(TokenKind end_kind) {
    const bool is_block = end_kind == TokenKind::kBlockEnd;
    const std::string_view closing = is_block ? "%}" : "}}";
    std::string open;  // brackets
    for (;;) {
      SkipSpaces();
      if (at_ >= source_.size()) Fail(fmt::format("a tag is not closed with {}", closing));
      const char c = source_[at_];
      if (open.empty()) {
        const bool has_sign = c == '-' || (is_block && c == '+');
        if (rest_.substr(at_ + (has_sign ? 1 : 0)).starts_with(closing)) {
          at_ += has_sign ? 3 : 2;
          EndTag(has_sign ? c : '\0', is_block);
          return Add(end_kind, "");
        }
      }
      if (IsNameStart(c)) {
        ReadName();
      } else if (IsDigit(c)) {
        ReadNumber();
      } else if (c == '\'' || c == '"') {
        ReadString(c);
      } else {
        ReadOperator(open);
      }
    }
  }

  void ReadName() {
    const size_t begin = at_;
    size_t end = at_;
    while (end < source_.size() && IsNamePart(source_[end])) ++end;
    Add(TokenKind::kName, source_.substr(begin, end - begin));
    at_ = end;
  }

  void ReadNumber() {
    size_t end = at_;
    const auto digits = [&] {
      while (end < source_.size() && (IsDigit(source_[end]) || source_[end] == '_')) ++end;
    };
    const auto is_digit_at = [&](size_t i) { return i < source_.size() && IsDigit(source_[i]); };
    TokenKind kind = TokenKind::kInteger;
    digits();
    const bool after_dot = !tokens_.empty() && tokens_.back().kind == TokenKind::kOperator &&
                           tokens_.back().text == ".";
    if (!after_dot && end < source_.size() && source_[end] == '.' && is_digit_at(end + 1)) {
      kind = TokenKind::kFloat;
      ++end;
      digits();
    }
    if (!after_dot && end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
      const bool has_sign =
          end + 1 < source_.size() && (source_[end + 1] == '-' || source_[end + 1] == '+');
      if (is_digit_at(end + (has_sign ? 2 : 1))) {
        kind = TokenKind::kFloat;
        end += has_sign ? 2 : 1;
        digits();
      }
    }
    std::string text = source_.substr(at_, end - at_);
    if (end < source_.size() && IsNamePart(source_[end])) {
      Fail(fmt::format("\"{}\" is no number that is supported", text + source_[end]));
    }
    text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
    Add(kind, std::move(text));
    at_ = end;
  }

  uint32_t ReadHex(size_t count) {
    uint32_t value = 0;
    for (size_t i = 0; i < count; ++i, ++at_) {
      const char c = at_ < source_.size() ? source_[at_] : '\0';
      const size_t digit = std::string_view("0123456789abcdef").find(static_cast<char>(c | 0x20));
      const bool is_hex = IsDigit(c) || (digit >= 10 && digit < 16);
      if (!is_hex) Fail(fmt::format("an escape in a string needs {} hexadecimal digits", count));
      value = value * 16 + static_cast<uint32_t>(IsDigit(c) ? c - '0' : static_cast<int>(digit));
    }
    return value;
  }

  void AppendEscape(std::string& text) {
    if (at_ >= source_.size()) return;
    const char c = source_[at_++];
    static constexpr std::string_view kLetters = "nrtabfv\\'\"";
    static constexpr std::string_view kMeanings = "\n\r\t\a\b\f\v\\'\"";
    if (const size_t known = kLetters.find(c); known != std::string_view::npos) {
      text += kMeanings[known];
    } else if (c == 'x' || c == 'u' || c == 'U') {
      const uint32_t code = ReadHex(c == 'x' ? 2 : c == 'u' ? 4 : 8);
      if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
        Fail("an escape in a string is no character");
      }
      tok::AppendUtf8(static_cast<char32_t>(code), text);
    } else if (c >= '0' && c <= '7') {
      uint32_t code = static_cast<uint32_t>(c - '0');
      for (int i = 0; i < 2 && at_ < source_.size() && source_[at_] >= '0' && source_[at_] <= '7';
           ++i) {
        code = code * 8 + static_cast<uint32_t>(source_[at_++] - '0');
      }
      tok::AppendUtf8(static_cast<char32_t>(code), text);
    } else if (c == 'N') {
      Fail("named characters in strings (\\N) are not supported");
    } else if (c != '\n') {  // a line break after a backslash joins the lines
      text += '\\';
      text += c;
    }
  }

  void ReadString(char quote) {
    const size_t begin = at_++;
    std::string text;
    while (at_ < source_.size() && source_[at_] != quote) {
      if (source_[at_] == '\\') {
        ++at_;
        AppendEscape(text);
      } else {
        text += source_[at_++];
      }
    }
    if (at_ >= source_.size()) {
      throw Problem("a string has no end", LineAt(begin));
    }
    ++at_;
    Add(TokenKind::kString, std::move(text));
  }

  void ReadOperator(std::string& open) {
    static constexpr std::string_view kOperators[] = {
        "**", "//", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  "<",  ">", "=", ".", ":", "|", ",", ";"};
    const auto* found = std::find_if(std::begin(kOperators), std::end(kOperators),
                                     [&](std::string_view op) { return Sees(op); });
    if (found == std::end(kOperators)) {
      const tok::Char c = tok::CharAt(source_, at_);
      Fail(fmt::format("unexpected character \"{}\"", source_.substr(at_, c.bytes)));
    }
    const char c = found->front();
    if (c == '(' || c == '[' || c == '{') {
      open += c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c) Fail(fmt::format("unexpected \"{}\"", c));
      open.pop_back();
    }
    Add(TokenKind::kOperator, std::string(*found));
    at_ += found->size();
  }

  const std::string source_;
  const std::string_view rest_;
  size_t at_ = 0;
  bool line_starts_ = true;  // nothing but line breaks between the line's start and at_
  std::vector<Token> tokens_;
  mutable size_t counted_ = 0;
  mutable int line_ = 1;
};

}  // namespace

std::vector<Token> Tokenise(std::string_view source) {
  return Lexer(source).Run();
}

}  // namespace winnow::chat
