// Values as text: as Python's str() prints them, and as JSON for the filter `tojson`.
#pragma once

#include <optional>
#include <string>

#include "chat/value.h"  // Value, Budget

namespace winnow::chat {

// str(value): what `{{ value }}` writes. Nothing for an undefined value. Problem for functions and
// the like, which a template prints only by mistake.
std::string ToText(const Value& value, Budget& budget);

// json.dumps, with the defaults of transformers.
struct JsonStyle {
  bool ensure_ascii = false;
  std::optional<std::string> indent = {};  // of a level; nothing: all on one line
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};
std::string ToJson(const Value& value, const JsonStyle& style, Budget& budget);

// repr(float): the shortest digits that read back to the same number.
std::string FloatText(double value);

}  // namespace winnow::chat
