#include "tokenizer/json_fields.h"

#include <fmt/format.h>

#include <limits>

#include "base/error.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {

Fields::Fields(const Json& value, std::string where) : value_(value), where_(std::move(where)) {
  if (!value_.is_object()) Fail(fmt::format("expected an object, got {}", value_.type_name()));
}

void Fields::Fail(const std::string& problem, const std::string& hint) const {
  throw ModelError(fmt::format("{}: {}", where_, problem), hint);
}

const Json* Fields::Find(const char* name) const {
  const auto found = value_.find(name);
  return found == value_.end() || found->is_null() ? nullptr : &*found;
}

const Json& Fields::Get(const char* name) const {
  const Json* field = Find(name);
  if (field == nullptr) Fail(fmt::format("field \"{}\" is missing", name));
  return *field;
}

std::string Fields::String(const char* name) const {
  const Json& field = Get(name);
  if (!field.is_string()) {
    Fail(fmt::format("\"{}\" must be a string, got {}", name, field.type_name()));
  }
  return field.get<std::string>();
}

std::optional<std::string> Fields::OptionalString(const char* name) const {
  if (Find(name) == nullptr) return std::nullopt;
  return String(name);
}

bool Fields::Bool(const char* name) const {
  const Json& field = Get(name);
  if (!field.is_boolean()) {
    Fail(fmt::format("\"{}\" must be true or false, got {}", name, field.type_name()));
  }
  return field.get<bool>();
}

bool Fields::Bool(const char* name, bool fallback) const {
  return Find(name) == nullptr ? fallback : Bool(name);
}

std::string Fields::Character(const char* name) const {
  std::string text = String(name);
  if (text.empty() || CharBytes(text[0]) != text.size()) {
    Fail(fmt::format("\"{}\" must be one character, got \"{}\"", name, text.substr(0, 40)));
  }
  return text;
}

int32_t Fields::Integer(const char* name) const {
  return TokenId(Get(name), fmt::format("{}: \"{}\"", where_, name));
}

const Json& Fields::Array(const char* name) const {
  const Json& field = Get(name);
  if (!field.is_array()) {
    Fail(fmt::format("\"{}\" must be an array, got {}", name, field.type_name()));
  }
  return field;
}

int32_t TokenId(const Json& value, const std::string& where) {
  constexpr uint64_t kLargest = std::numeric_limits<int32_t>::max() - 1;
  if (!value.is_number_unsigned() || value.get<uint64_t>() > kLargest) {
    throw ModelError(fmt::format("{}: expected an integer 0 to {}, got {}", where, kLargest,
                                 DumpJson(value).substr(0, 60)));
  }
  return static_cast<int32_t>(value.get<uint64_t>());
}

}  // namespace winnow::tok
