// The filters (`value | name(...)`) and tests (`value is name(...)`) of the template language.
#pragma once

#include <string>
#include <string_view>

#include "chat/value.h"  // Value, Arguments, Budget

namespace winnow::chat {

bool IsFilter(std::string_view name);
// Problem if the value or an argument is not what the filter takes.
Value ApplyFilter(const std::string& name, const Value& value, const Arguments& arguments,
                  Budget& budget);

bool IsTest(std::string_view name);
bool ApplyTest(const std::string& name, const Value& value, const Arguments& arguments,
               Budget& budget);

}  // namespace winnow::chat
