// Walks a parsed template and writes its text.
#pragma once

#include <cstdint>
#include <ctime>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "chat/syntax.h"  // Block

namespace winnow::chat {

struct RenderedText {
  std::string text;
  // What stood in {% generation %} blocks: [begin, end) in bytes of `text`, in order.
  std::vector<std::pair<size_t, size_t>> generated;
};

// `variables`: what the template may read by name, in any order; of equal names the last counts.
// `now`: local time for strftime_now. Problem (with its line) for what cannot be evaluated, Refusal
// if the template calls raise_exception.
RenderedText Interpret(const Block& block, std::vector<std::pair<std::string, Value>> variables,
                       const std::function<std::tm()>& now, uint64_t input_bytes);

}  // namespace winnow::chat
