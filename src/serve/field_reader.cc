#include "serve/field_reader.h"

#include <fmt/format.h>

#include <cmath>

#include "serve/api_error.h"

namespace winnow {

FieldReader::FieldReader(const OrderedJson& body, std::string prefix)
    : body_(body), prefix_(std::move(prefix)) {
  if (!body.is_object()) {
    throw InvalidField(prefix_.empty() ? "body" : prefix_.substr(0, prefix_.size() - 1),
                       "a JSON object");
  }
}

const OrderedJson* FieldReader::Find(const std::string& name) {
  known_.insert(name);
  const auto field = body_.find(name);
  return field == body_.end() || field->is_null() ? nullptr : &*field;
}

std::optional<bool> FieldReader::Flag(const std::string& name) {
  const OrderedJson* value = Find(name);
  if (value == nullptr) return {};
  if (!value->is_boolean()) throw InvalidField(Name(name), "true or false");
  return value->get<bool>();
}

std::optional<int64_t> FieldReader::Integer(const std::string& name, int64_t low, int64_t high) {
  const OrderedJson* value = Find(name);
  if (value == nullptr) return {};
  // A whole number as a float (16.0) is what some clients send.
  std::optional<int64_t> number;
  if (value->is_number_unsigned()) {
    if (value->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)) number = value->get<int64_t>();
  } else if (value->is_number_integer()) {
    number = value->get<int64_t>();
  } else if (value->is_number_float()) {
    const double real = value->get<double>();
    if (std::abs(real) < 0x1p53 && real == std::floor(real)) number = static_cast<int64_t>(real);
  }
  if (!number || *number < low || *number > high) {
    throw InvalidField(Name(name), high == INT64_MAX
                                       ? fmt::format("a whole number of {} or more", low)
                                       : fmt::format("a whole number from {} to {}", low, high));
  }
  return number;
}

std::optional<double> FieldReader::Number(const std::string& name, double low, double high) {
  const OrderedJson* value = Find(name);
  if (value == nullptr) return {};
  const double number = value->is_number() ? value->get<double>() : std::nan("");
  if (!(number >= low && number <= high)) {
    throw InvalidField(Name(name), fmt::format("a number from {:g} to {:g}", low, high));
  }
  return number;
}

std::optional<std::string> FieldReader::Text(const std::string& name) {
  const OrderedJson* value = Find(name);
  if (value == nullptr) return {};
  if (!value->is_string()) throw InvalidField(Name(name), "a string");
  return value->get<std::string>();
}

void FieldReader::Ignore(const std::vector<std::string>& names) {
  known_.insert(names.begin(), names.end());
}

void FieldReader::RefuseOthers() const {
  for (const auto& [name, value] : body_.items()) {
    if (known_.contains(name) || value.is_null()) continue;
    const std::string shown = prefix_ + name.substr(0, 64);
    throw ApiError(
        400, "unknown_parameter",
        fmt::format("{}: unknown field; it might change the answer, so it is not ignored", shown),
        shown);
  }
}

std::vector<int32_t> ReadTokenIds(const OrderedJson& list, const std::string& field,
                                  int64_t vocab_size) {
  if (!list.is_array()) throw InvalidField(field, "a list of token ids");
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const OrderedJson& item : list) {
    const int64_t id = item.is_number_integer() ? item.get<int64_t>() : -1;
    if (id < 0 || id >= vocab_size) {
      throw InvalidField(field, fmt::format("token ids from 0 to {}", vocab_size - 1));
    }
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

}  // namespace winnow
