// Typed access to an object of a file that winnow wrote: ModelError with the file's name, the key,
// what was expected and a hint for anything missing, mistyped or out of range.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"  // Json

namespace winnow {

class JsonRecord {
 public:
  // `json` must outlive the record.
  JsonRecord(const Json& json, std::string where, std::string hint);
  [[noreturn]] void Fail(const std::string& key, const std::string& expected) const;
  const Json& At(const std::string& key) const;
  int64_t Integer(const std::string& key, int64_t low, int64_t high) const;
  std::string Text(const std::string& key) const;
  bool Flag(const std::string& key) const;
  const Json& List(const std::string& key) const;
  // `list` is the value of `key` or a part of it.
  std::vector<double> Numbers(const std::string& key, const Json& list) const;
  std::vector<std::string> Names(const std::string& key) const;

 private:
  const Json& json_;
  std::string where_, hint_;
};

}  // namespace winnow
