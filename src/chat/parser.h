// From tokens to statements: Jinja's grammar as far as chat templates use it. What is not supported
// is refused by name.
#pragma once

#include <string_view>

#include "chat/syntax.h"  // Block

namespace winnow::chat {

// `source` is valid UTF-8. Problem with its line for what is wrong or not supported.
Block ParseTemplate(std::string_view source);

}  // namespace winnow::chat
