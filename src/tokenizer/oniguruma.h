// Regular expressions of tokenizer.json are Oniguruma's (Ruby syntax); we match them with PCRE2.
// The two differ in what \s, \w, \d, \h, $, ^, (?m), {n,m}+ and (?i) mean and in their Unicode
// version, so a pattern is parsed and written again with the sets spelled out. What has no exact
// counterpart is refused.
#pragma once

#include <string>
#include <string_view>

namespace winnow::tok {

// For PCRE2 with UTF and UCP. Throws ModelError naming `where`, the pattern and the position.
std::string OnigurumaToPcre2(std::string_view pattern, const std::string& where);

// The longest pattern accepted; real ones are below 2 KiB.
inline constexpr size_t kMaxPatternBytes = 65536;

}  // namespace winnow::tok
