// Methods of strings, dictionaries and lists.
#pragma once

#include <string>

#include "chat/value.h"  // Value, Arguments, Budget

namespace winnow::chat {

// Whether `value.name` is a method that CallMethod knows.
bool IsMethod(const Value& value, const std::string& name);
// A method that Python has and CallMethod has not: named in the refusal.
bool IsRefusedMethod(const Value& value, const std::string& name);
Value CallMethod(const Value& self, const std::string& name, const Arguments& arguments,
                 Budget& budget);

}  // namespace winnow::chat
