// The page served at `/`: one HTML text without external resources (page/index.html).
#pragma once

#include <string_view>

namespace winnow {

std::string_view ChatPage();

}  // namespace winnow
