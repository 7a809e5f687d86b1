#include "tokenizer/char_set.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <utility>

namespace winnow::tok {
namespace {

struct Addition {
  const char* name;
  char32_t first;
  char32_t last;
};

#include "tokenizer/oniguruma_tables.inc"

// White_Space. PCRE2's \s has U+180E too, which left that set in Unicode 6.3.
constexpr std::string_view kSpace =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";

constexpr std::array<std::pair<std::string_view, std::string_view>, 35> kLongNames = {{
    {"letter", "L"},
    {"uppercaseletter", "Lu"},
    {"lowercaseletter", "Ll"},
    {"titlecaseletter", "Lt"},
    {"modifierletter", "Lm"},
    {"otherletter", "Lo"},
    {"mark", "M"},
    {"nonspacingmark", "Mn"},
    {"spacingmark", "Mc"},
    {"enclosingmark", "Me"},
    {"number", "N"},
    {"decimalnumber", "Nd"},
    {"letternumber", "Nl"},
    {"othernumber", "No"},
    {"punctuation", "P"},
    {"connectorpunctuation", "Pc"},
    {"dashpunctuation", "Pd"},
    {"openpunctuation", "Ps"},
    {"closepunctuation", "Pe"},
    {"initialpunctuation", "Pi"},
    {"finalpunctuation", "Pf"},
    {"otherpunctuation", "Po"},
    {"symbol", "S"},
    {"mathsymbol", "Sm"},
    {"currencysymbol", "Sc"},
    {"modifiersymbol", "Sk"},
    {"othersymbol", "So"},
    {"separator", "Z"},
    {"spaceseparator", "Zs"},
    {"lineseparator", "Zl"},
    {"paragraphseparator", "Zp"},
    {"control", "Cc"},
    {"format", "Cf"},
    {"privateuse", "Co"},
    {"digit", "Nd"},
}};
// Categories whose set only grew between the two Unicode versions. Cn and C shrank: not here.
constexpr std::string_view kCategories[] = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc",
                                            "Me", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps",
                                            "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So",
                                            "Z",  "Zs", "Zl", "Zp", "Cc", "Cf", "Co"};
constexpr std::string_view kScripts[] = {"Han",    "Hiragana", "Katakana",  "Hangul",
                                         "Latin",  "Greek",    "Cyrillic",  "Arabic",
                                         "Hebrew", "Thai",     "Devanagari"};

std::string Lower(std::string_view name) {
  std::string lower;
  for (const char c : name) {
    if (c == ' ' || c == '_' || c == '-') continue;
    lower.push_back(static_cast<char>(std::tolower(static_cast<unsigned char>(c))));
  }
  return lower;
}

std::string Category(std::string_view name) {
  std::string body = fmt::format("\\p{{{}}}", name);
  for (const Addition& addition : kCategoryAdditions) {
    if (std::string_view(addition.name).starts_with(name)) {
      body += PcreRange(addition.first, addition.last);
    }
  }
  return body;
}

}  // namespace

std::string PcreCode(char32_t code) {
  if (code < 0x80 && std::isalnum(static_cast<int>(code)) != 0) {
    return std::string(1, static_cast<char>(code));
  }
  return fmt::format("\\x{{{:x}}}", static_cast<uint32_t>(code));
}

std::string PcreRange(char32_t first, char32_t last) {
  return first == last ? PcreCode(first) : PcreCode(first) + "-" + PcreCode(last);
}

std::string PcreShorthand(char letter, bool in_bracket) {
  switch (letter) {
    case 's':
      return std::string(kSpace);
    case 'd':
      return Category("Nd");
    case 'h':
      return "0-9A-Fa-f";
    default:  // \w: alphabetic, marks, decimal digits, connectors
      return Category("L") + Category("M") + Category("Nd") + Category("Nl") + Category("Pc") +
             "\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}" +
             (in_bracket ? "" : "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}");
  }
}

std::optional<std::string> PcreProperty(std::string_view name) {
  const std::string lower = Lower(name);
  for (const std::string_view category : kCategories) {
    if (Lower(category) == lower) return Category(category);
  }
  for (const auto& [long_name, category] : kLongNames) {
    if (long_name == lower) return Category(category);
  }
  for (const std::string_view script : kScripts) {
    if (Lower(script) != lower) continue;
    std::string body = fmt::format("\\p{{sc:{}}}", script);
    for (const Addition& addition : kScriptAdditions) {
      if (addition.name == lower) body += PcreRange(addition.first, addition.last);
    }
    return body;
  }
  if (lower == "any") return "\\x{0}-\\x{10ffff}";
  if (lower == "space") return std::string(kSpace);
  return std::nullopt;
}

std::optional<std::string> PcrePosix(std::string_view name) {
  if (name == "space") return std::string(kSpace);
  if (name == "digit") return Category("Nd");
  if (name == "punct") return Category("P") + Category("S");
  if (name == "cntrl") return Category("Cc");
  if (name == "word") return PcreShorthand('w', true);
  if (name == "xdigit") return "0-9A-Fa-f";
  return std::nullopt;
}

}  // namespace winnow::tok
