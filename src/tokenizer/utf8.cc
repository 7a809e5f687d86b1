#include "tokenizer/utf8.h"

#include <algorithm>
#include <cstring>
#include <span>

namespace winnow::tok {
namespace {

struct Range {
  char32_t first;
  char32_t last;
};

#include "tokenizer/unicode_tables.inc"

bool Contains(std::span<const Range> ranges, char32_t code) {
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), code,
                       [](char32_t c, const Range& range) { return c < range.first; });
  return after != ranges.begin() && code <= std::prev(after)->last;
}

}  // namespace

Char CharBefore(std::string_view text, size_t position) {
  size_t start = position - 1;
  while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
  return CharAt(text, start);
}

void AppendUtf8(char32_t code, std::string& out) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

Utf8Step ClassifyUtf8(std::string_view text, size_t position) {
  const auto lead = static_cast<unsigned char>(text[position]);
  if (lead < 0x80) return {Utf8Status::kValid, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Status::kInvalid, 1};
  const size_t length = CharBytes(text[position]);
  // The second byte's range excludes overlong forms, surrogates and codes beyond U+10FFFF.
  unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < length; ++i) {
    if (position + i == text.size()) return {Utf8Status::kIncomplete, i};
    const auto byte = static_cast<unsigned char>(text[position + i]);
    if (byte < low || byte > high) return {Utf8Status::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Status::kValid, length};
}

size_t ValidUtf8Prefix(std::string_view text) {
  size_t position = 0;
  while (position < text.size()) {
    uint64_t block = 0;
    while (position + 8 <= text.size()) {
      std::memcpy(&block, text.data() + position, 8);
      if ((block & 0x8080808080808080u) != 0) break;
      position += 8;
    }
    if (position == text.size()) break;
    const Utf8Step step = ClassifyUtf8(text, position);
    if (step.status != Utf8Status::kValid) break;
    position += step.bytes;
  }
  return position;
}

void AppendLossyUtf8(std::string_view text, std::string& out) {
  while (!text.empty()) {
    const size_t valid = ValidUtf8Prefix(text);
    out.append(text.substr(0, valid));
    text.remove_prefix(valid);
    if (text.empty()) break;
    AppendUtf8(kReplacementCharacter, out);
    text.remove_prefix(ClassifyUtf8(text, 0).bytes);
  }
}

bool IsSpace(char32_t code) {
  if (code < 0x80) return code == ' ' || (code >= 0x09 && code <= 0x0D);
  return code == 0x85 || code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) ||
         code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

bool IsNumeric(char32_t code) {
  if (code < 0x80) return code >= '0' && code <= '9';
  return Contains(kNumeric, code);
}

bool IsWordCharacter(char32_t code) {
  return Contains(kWord, code);
}

bool IsPunctuation(char32_t code) {
  return Contains(kPunctuation, code);
}

bool IsCombiningMark(char32_t code) {
  return Contains(kCombiningMarks, code);
}

}  // namespace winnow::tok
