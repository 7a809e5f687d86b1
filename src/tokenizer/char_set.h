// The sets of characters an Oniguruma pattern can name, as the inside of a PCRE2 bracket.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace winnow::tok {

// \x{...} for one code point: safe inside and outside brackets.
std::string PcreCode(char32_t code);
std::string PcreRange(char32_t first, char32_t last);

// \s \d \w \h by their letter. Outside brackets \w has six more characters below U+0100.
std::string PcreShorthand(char letter, bool in_bracket);
// \p{name}: general categories (short or long names), some scripts, a few POSIX names. Nothing if
// unknown here.
std::optional<std::string> PcreProperty(std::string_view name);
// [:name:] in a bracket.
std::optional<std::string> PcrePosix(std::string_view name);

}  // namespace winnow::tok
