// A compiled regular expression of a tokenizer file: Oniguruma syntax, matched by PCRE2 with its
// just-in-time compiler. Immutable and shareable; what a search writes to is in RegexScratch.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace winnow::tok {

struct Span {
  size_t begin;
  size_t end;
};

// One per thread: match block and stack.
class RegexScratch {
 public:
  RegexScratch();
  RegexScratch(RegexScratch&&) noexcept;
  ~RegexScratch();

 private:
  friend class Regex;
  struct State;
  std::unique_ptr<State> state_;
};

class Regex {
 public:
  // Throws ModelError naming `where` if the pattern is wrong or not supported exactly.
  Regex(std::string_view oniguruma_pattern, const std::string& where);

  // The leftmost match that starts at `from` or later. `text` must be valid UTF-8 and `from` a
  // character border. Never fails for length alone; RuntimeError if backtracking explodes.
  bool Search(std::string_view text, size_t from, RegexScratch& scratch, Span* match) const;

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

}  // namespace winnow::tok
