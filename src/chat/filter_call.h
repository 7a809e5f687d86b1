// What a filter is called with; shared by the files that define filters.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "chat/value.h"  // Value, Arguments, Budget

namespace winnow::chat {

struct FilterCall {
  const std::string& name;
  const Value& value;
  const Arguments& arguments;
  Budget& budget;

  std::vector<Value> Bind(const std::vector<std::string_view>& names, size_t required = 0) const {
    return BindArguments(arguments, names, required, name);
  }
  // The value, or an argument, as the filter needs it; Problem otherwise.
  const std::string& Text(const Value& text) const;
  int64_t Whole(const Value& whole, int64_t fallback) const;
  // The value as Python's str() has it: what most filters of text begin with.
  std::string AsText() const;
  Value Result(std::string text) const;
};

struct Filter {
  std::string_view name;
  Value (*apply)(const FilterCall&);
};
// Filters of lists and dictionaries (list_filters.cc); null if there is none of that name.
const Filter* FindListFilter(std::string_view name);

}  // namespace winnow::chat
