#include "chat/text_functions.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstring>

#include "tokenizer/utf8.h"

namespace winnow::chat {
namespace {

utf8proc_int32_t Code(char32_t code) {
  return static_cast<utf8proc_int32_t>(code);
}

utf8proc_category_t Category(char32_t code) {
  return utf8proc_category(Code(code));
}

bool IsLetter(char32_t code) {
  const utf8proc_category_t c = Category(code);
  return c == UTF8PROC_CATEGORY_LU || c == UTF8PROC_CATEGORY_LL || c == UTF8PROC_CATEGORY_LT ||
         c == UTF8PROC_CATEGORY_LM || c == UTF8PROC_CATEGORY_LO;
}

bool IsCased(char32_t code) {
  return utf8proc_toupper(Code(code)) != Code(code) || utf8proc_tolower(Code(code)) != Code(code);
}

void AppendUpper(char32_t code, std::string& out) {
  if (code == U'ß') {
    out += "SS";
  } else {
    tok::AppendUtf8(static_cast<char32_t>(utf8proc_toupper(Code(code))), out);
  }
}

void AppendTitle(char32_t code, std::string& out) {
  if (code == U'ß') {
    out += "Ss";
  } else {
    tok::AppendUtf8(static_cast<char32_t>(utf8proc_totitle(Code(code))), out);
  }
}

void AppendLower(char32_t code, std::string& out) {
  tok::AppendUtf8(static_cast<char32_t>(utf8proc_tolower(Code(code))), out);
}

template <class Function>
void ForEachCharacter(std::string_view text, Function on_character) {
  for (size_t at = 0; at < text.size();) {
    const tok::Char c = tok::CharAt(text, at);
    on_character(c.code);
    at += c.bytes;
  }
}

bool IsLineEnd(char32_t code) {
  return (code >= 0x0A && code <= 0x0D) || (code >= 0x1C && code <= 0x1E) || code == 0x85 ||
         code == 0x2028 || code == 0x2029;
}

}  // namespace

bool IsPythonSpace(char32_t code) {
  return tok::IsSpace(code) || (code >= 0x1C && code <= 0x1F);
}

bool IsPrintable(char32_t code) {
  if (code == U' ') return true;
  switch (Category(code)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return false;
    default:
      return true;
  }
}

std::string_view Strip(std::string_view text, const std::string* characters, StripSide side) {
  std::u32string wanted;
  if (characters != nullptr) {
    wanted = Decode(*characters);
    std::sort(wanted.begin(), wanted.end());
  }
  const auto is_stripped = [&](char32_t code) {
    return characters == nullptr ? IsPythonSpace(code)
                                 : std::binary_search(wanted.begin(), wanted.end(), code);
  };
  while (side != StripSide::kRight && !text.empty()) {
    const tok::Char first = tok::CharAt(text, 0);
    if (!is_stripped(first.code)) break;
    text.remove_prefix(first.bytes);
  }
  while (side != StripSide::kLeft && !text.empty()) {
    const tok::Char last = tok::CharBefore(text, text.size());
    if (!is_stripped(last.code)) break;
    text.remove_suffix(last.bytes);
  }
  return text;
}

std::u32string Decode(std::string_view text) {
  std::u32string characters;
  characters.reserve(text.size());
  ForEachCharacter(text, [&](char32_t code) { characters.push_back(code); });
  return characters;
}

std::string EncodeCharacters(std::u32string_view characters) {
  std::string text;
  for (const char32_t code : characters) tok::AppendUtf8(code, text);
  return text;
}

int64_t CountCharacters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;  // not inside a character
  });
}

size_t FindText(std::string_view text, std::string_view needle, size_t from) {
  if (from > text.size()) return std::string_view::npos;
  if (needle.empty()) return from;
  // memmem is linear; std::string_view::find is not.
  const void* found = memmem(text.data() + from, text.size() - from, needle.data(), needle.size());
  if (found == nullptr) return std::string_view::npos;
  return static_cast<size_t>(static_cast<const char*>(found) - text.data());
}

std::vector<std::string_view> SplitAt(std::string_view text, std::string_view separator,
                                      int64_t most, bool from_right) {
  std::vector<std::string_view> pieces;
  const auto may_cut = [&] { return most < 0 || std::ssize(pieces) < most; };
  if (from_right) {
    while (may_cut()) {
      const size_t at = text.rfind(separator);
      if (at == std::string_view::npos) break;
      pieces.push_back(text.substr(at + separator.size()));
      text = text.substr(0, at);
    }
    pieces.push_back(text);
    std::reverse(pieces.begin(), pieces.end());
    return pieces;
  }
  while (may_cut()) {
    const size_t at = FindText(text, separator);
    if (at == std::string_view::npos) break;
    pieces.push_back(text.substr(0, at));
    text = text.substr(at + separator.size());
  }
  pieces.push_back(text);
  return pieces;
}

std::vector<std::string_view> SplitAtSpaces(std::string_view text, int64_t most, bool from_right) {
  const StripSide outer = from_right ? StripSide::kRight : StripSide::kLeft;
  std::vector<std::string_view> pieces;
  for (text = Strip(text, nullptr, outer); !text.empty(); text = Strip(text, nullptr, outer)) {
    if (most >= 0 && std::ssize(pieces) == most) {
      pieces.push_back(text);
      break;
    }
    size_t at = from_right ? text.size() : 0;
    while (from_right ? at > 0 : at < text.size()) {
      const tok::Char c = from_right ? tok::CharBefore(text, at) : tok::CharAt(text, at);
      if (IsPythonSpace(c.code)) break;
      at = from_right ? at - c.bytes : at + c.bytes;
    }
    pieces.push_back(from_right ? text.substr(at) : text.substr(0, at));
    text = from_right ? text.substr(0, at) : text.substr(at);
  }
  if (from_right) std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const tok::Char c = tok::CharAt(text, at);
    size_t end = at + c.bytes;
    if (IsLineEnd(c.code)) {
      if (c.code == U'\r' && end < text.size() && text[end] == '\n') ++end;
      lines.push_back(text.substr(begin, (keep_ends ? end : at) - begin));
      begin = end;
    }
    at = end;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

std::string ReplaceText(std::string_view text, std::string_view old, std::string_view with,
                        int64_t most) {
  std::string result;
  size_t at = 0;
  for (int64_t done = 0; most < 0 || done < most; ++done) {
    if (old.empty()) {  // Python puts `with` before every character and at the end
      result += with;
      if (at == text.size()) return result;
      const size_t bytes = tok::CharBytes(text[at]);
      result += text.substr(at, bytes);
      at += bytes;
      continue;
    }
    const size_t found = FindText(text, old, at);
    if (found == std::string_view::npos) break;
    result += text.substr(at, found - at);
    result += with;
    at = found + old.size();
  }
  result += text.substr(at);
  return result;
}

std::string Upper(std::string_view text) {
  std::string result;
  ForEachCharacter(text, [&](char32_t code) { AppendUpper(code, result); });
  return result;
}

std::string Lower(std::string_view text) {
  std::string result;
  ForEachCharacter(text, [&](char32_t code) { AppendLower(code, result); });
  return result;
}

std::string Capitalize(std::string_view text) {
  std::string result;
  bool first = true;
  ForEachCharacter(text, [&](char32_t code) {
    first ? AppendTitle(code, result) : AppendLower(code, result);
    first = false;
  });
  return result;
}

std::string Title(std::string_view text) {
  std::string result;
  bool inside = false;
  ForEachCharacter(text, [&](char32_t code) {
    inside ? AppendLower(code, result) : AppendTitle(code, result);
    inside = IsCased(code);
  });
  return result;
}

bool IsAll(std::string_view text, CharacterClass wanted) {
  bool all = !text.empty();
  ForEachCharacter(text, [&](char32_t code) {
    const bool is_digit = Category(code) == UTF8PROC_CATEGORY_ND;
    switch (wanted) {
      case CharacterClass::kAlpha:
        all = all && IsLetter(code);
        break;
      case CharacterClass::kDigit:
        all = all && is_digit;
        break;
      case CharacterClass::kAlphanumeric:
        all = all && (IsLetter(code) || tok::IsNumeric(code));
        break;
      case CharacterClass::kSpace:
        all = all && IsPythonSpace(code);
        break;
    }
  });
  return all;
}

bool IsUpper(std::string_view text) {
  bool any = false, all = true;
  ForEachCharacter(text, [&](char32_t code) {
    any = any || IsCased(code);
    all = all && utf8proc_toupper(Code(code)) == Code(code);
  });
  return any && all;
}

bool IsLower(std::string_view text) {
  bool any = false, all = true;
  ForEachCharacter(text, [&](char32_t code) {
    any = any || IsCased(code);
    all = all && utf8proc_tolower(Code(code)) == Code(code);
  });
  return any && all;
}

SliceRange ResolveSlice(int64_t size, std::optional<int64_t> start, std::optional<int64_t> stop,
                        int64_t step) {
  const int64_t least = step < 0 ? -1 : 0;
  const int64_t most = step < 0 ? size - 1 : size;
  const auto resolve = [&](const std::optional<int64_t>& position, int64_t fallback) {
    if (!position) return fallback;
    const int64_t from_start = *position < 0 ? *position + size : *position;
    return std::clamp(from_start, least, most);
  };
  const int64_t begin = resolve(start, step < 0 ? most : least);
  const int64_t end = resolve(stop, step < 0 ? least : most);
  int64_t count = 0;
  if (step > 0 && begin < end) count = (end - begin - 1) / step + 1;
  if (step < 0 && begin > end) count = (begin - end - 1) / -step + 1;
  return {begin, step, count};
}

}  // namespace winnow::chat
