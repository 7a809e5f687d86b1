// Python's string methods on UTF-8: what templates expect of `strip`, `split`, slices and the like.
// Positions count characters (code points). All text is valid UTF-8.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace winnow::chat {

// As str.isspace: White_Space and the four ASCII separators.
bool IsPythonSpace(char32_t code);
bool IsPrintable(char32_t code);

enum class StripSide { kBoth, kLeft, kRight };
// Without `characters`: whitespace.
std::string_view Strip(std::string_view text, const std::string* characters, StripSide side);

std::u32string Decode(std::string_view text);
std::string EncodeCharacters(std::u32string_view characters);
int64_t CountCharacters(std::string_view text);

// The place of the first `needle` at or after `from`, npos if there is none; linear in the text.
size_t FindText(std::string_view text, std::string_view needle, size_t from = 0);

// `most` pieces are cut off at most; negative: no limit. `separator` is not empty.
std::vector<std::string_view> SplitAt(std::string_view text, std::string_view separator,
                                      int64_t most, bool from_right);
std::vector<std::string_view> SplitAtSpaces(std::string_view text, int64_t most, bool from_right);
std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends);

std::string ReplaceText(std::string_view text, std::string_view old, std::string_view with,
                        int64_t most);

// Each character by Unicode's simple case mapping, and the sharp s as SS.
std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
// Every run of letters begins with a capital.
std::string Title(std::string_view text);

enum class CharacterClass { kAlpha, kDigit, kAlphanumeric, kSpace };
// Whether there are characters and all are of that class.
bool IsAll(std::string_view text, CharacterClass wanted);
bool IsUpper(std::string_view text);
bool IsLower(std::string_view text);

// The positions `[start:stop:step]` selects among `size`, as Python's slice.indices; step is not 0.
struct SliceRange {
  int64_t start, step, count;
};
SliceRange ResolveSlice(int64_t size, std::optional<int64_t> start, std::optional<int64_t> stop,
                        int64_t step);

}  // namespace winnow::chat
