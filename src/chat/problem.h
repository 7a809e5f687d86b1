// What goes wrong while a template is parsed or rendered, before it is known in which file and
// line: chat_template.cc turns a Problem into a ModelError and a Refusal into a UsageError.
#pragma once

#include <stdexcept>
#include <string>

namespace winnow::chat {

// `what` without a place; `line` 0: the line of what is being evaluated.
class Problem : public std::runtime_error {
 public:
  explicit Problem(const std::string& what, int line = 0) : std::runtime_error(what), line_(line) {}
  int line() const { return line_; }

 private:
  int line_;
};

// raise_exception: the template itself refuses the messages.
class Refusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace winnow::chat
