#include "base/json_record.h"

#include <fmt/format.h>

#include "base/error.h"

namespace winnow {

JsonRecord::JsonRecord(const Json& json, std::string where, std::string hint)
    : json_(json), where_(std::move(where)), hint_(std::move(hint)) {
  if (!json.is_object()) Fail("", "an object");
}

void JsonRecord::Fail(const std::string& key, const std::string& expected) const {
  throw ModelError(fmt::format("{}: \"{}\": expected {}", where_, key, expected), hint_);
}

const Json& JsonRecord::At(const std::string& key) const {
  const auto it = json_.find(key);
  if (it == json_.end()) Fail(key, "to be there");
  return *it;
}

int64_t JsonRecord::Integer(const std::string& key, int64_t low, int64_t high) const {
  const Json& value = At(key);
  if (!value.is_number_integer()) Fail(key, "an integer");
  const auto number = value.get<int64_t>();
  if (number < low || number > high) Fail(key, fmt::format("{} to {}", low, high));
  return number;
}

std::string JsonRecord::Text(const std::string& key) const {
  if (!At(key).is_string()) Fail(key, "a string");
  return At(key).get<std::string>();
}

bool JsonRecord::Flag(const std::string& key) const {
  if (!At(key).is_boolean()) Fail(key, "true or false");
  return At(key).get<bool>();
}

const Json& JsonRecord::List(const std::string& key) const {
  if (!At(key).is_array()) Fail(key, "a list");
  return At(key);
}

std::vector<double> JsonRecord::Numbers(const std::string& key, const Json& list) const {
  std::vector<double> numbers;
  if (!list.is_array()) Fail(key, "a list of numbers");
  for (const Json& item : list) {
    if (!item.is_number()) Fail(key, "a list of numbers");
    numbers.push_back(item.get<double>());
  }
  return numbers;
}

std::vector<std::string> JsonRecord::Names(const std::string& key) const {
  std::vector<std::string> names;
  for (const Json& item : List(key)) {
    if (!item.is_string()) Fail(key, "a list of names");
    names.push_back(item.get<std::string>());
  }
  return names;
}

}  // namespace winnow
