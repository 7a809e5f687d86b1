// UTF-8 helpers and the character sets the tokenizer's components ask about. The sets are those of
// the reference library's own tables (Rust's char, the regex crate, unicode_categories), which
// follow different Unicode versions; see unicode_tables.inc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace winnow::tok {

inline constexpr char32_t kReplacementCharacter = 0xFFFD;

struct Char {
  char32_t code;
  size_t bytes;
};

// Bytes of the character that starts with `lead`, in valid UTF-8.
inline size_t CharBytes(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The character at `position` of valid UTF-8 text.
inline Char CharAt(std::string_view text, size_t position) {
  const auto byte = [&](size_t i) {
    return static_cast<char32_t>(static_cast<unsigned char>(text[position + i]));
  };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) return {(lead & 0x1F) << 6 | (byte(1) & 0x3F), 2};
  if (lead < 0xF0) return {(lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
  return {(lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F),
          4};
}

// The last character before `position` (> 0) of valid UTF-8 text.
Char CharBefore(std::string_view text, size_t position);

void AppendUtf8(char32_t code, std::string& out);

// What stands at a position of text that may be no valid UTF-8.
enum class Utf8Status {
  kValid,
  kInvalid,     // `bytes` bytes are a maximal ill-formed part: one U+FFFD
  kIncomplete,  // the text ends inside a character that is well-formed so far
};
struct Utf8Step {
  Utf8Status status;
  size_t bytes;
};
Utf8Step ClassifyUtf8(std::string_view text, size_t position);

// Bytes at the start of `text` that are valid UTF-8.
size_t ValidUtf8Prefix(std::string_view text);
// Every maximal ill-formed part becomes one U+FFFD (as Rust's from_utf8_lossy).
void AppendLossyUtf8(std::string_view text, std::string& out);

bool IsSpace(char32_t code);          // White_Space
bool IsNumeric(char32_t code);        // Rust's char::is_numeric
bool IsWordCharacter(char32_t code);  // \w of the regex crate
bool IsPunctuation(char32_t code);    // ASCII punctuation and \p{P}
bool IsCombiningMark(char32_t code);  // what StripAccents removes

}  // namespace winnow::tok
