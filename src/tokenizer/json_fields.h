// Checked access to the fields of a JSON object that came from a tokenizer file. Every problem is a
// ModelError that names the place ("tokenizer.json: decoder: content").
#pragma once

#include <optional>
#include <string>

#include "base/json.h"  // Json

namespace winnow::tok {

class Fields {
 public:
  // Refuses anything but an object. `value` must outlive this.
  Fields(const Json& value, std::string where);

  const std::string& where() const { return where_; }
  [[noreturn]] void Fail(const std::string& problem, const std::string& hint = {}) const;

  // Null if the field is absent or null.
  const Json* Find(const char* name) const;
  const Json& Get(const char* name) const;
  std::string String(const char* name) const;
  std::optional<std::string> OptionalString(const char* name) const;
  bool Bool(const char* name) const;
  bool Bool(const char* name, bool fallback) const;
  // A string of exactly one character.
  std::string Character(const char* name) const;
  // 0 .. 2^31 - 2: an id, or a count.
  int32_t Integer(const char* name) const;
  const Json& Array(const char* name) const;

 private:
  const Json& value_;
  std::string where_;
};

// An integer 0 .. 2^31 - 2, as every token id here is.
int32_t TokenId(const Json& value, const std::string& where);

}  // namespace winnow::tok
