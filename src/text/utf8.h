// UTF-8 as RFC 3629 defines it: no surrogates, no overlong forms, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace winnow {

// Position of the first byte that does not belong to a complete character.
std::optional<size_t> FirstInvalidUtf8(std::string_view text);

}  // namespace winnow
