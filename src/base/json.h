// Strict JSON: the parser every outside file goes through. Refuses invalid UTF-8, duplicate keys,
// nesting beyond kMaxJsonDepth and trailing bytes, with the file's name in the message.
// Json sorts keys (fast on objects of 100,000 keys); OrderedJson keeps the file's order and is for
// small files that are edited and written back (config.json).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace winnow {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

inline constexpr int kMaxJsonDepth = 64;

// Throws ModelError naming `where` (usually the path) and the byte offset.
Json ParseJson(std::string_view text, const std::string& where);
OrderedJson ParseOrderedJson(std::string_view text, const std::string& where);

// Compact or indented text; doubles in the shortest form that reads back to the same bits.
// Invalid UTF-8 in strings becomes U+FFFD instead of an exception.
std::string DumpJson(const Json& value, int indent = -1);

}  // namespace winnow
