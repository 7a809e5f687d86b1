// What a Split or Replace looks for, and the division of a text into matches and the gaps between.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "base/json.h"  // Json
#include "tokenizer/function_ref.h"
#include "tokenizer/regex.h"

namespace winnow::tok {

class Matcher {
 public:
  using Predicate = bool (*)(char32_t);

  static Matcher FromRegex(std::string_view oniguruma_pattern, const std::string& where);
  static Matcher FromText(std::string text);
  // Every character of the set is a match of its own.
  static Matcher FromSet(Predicate contains);
  // The runs of the regex crate's `\w+|[^\w\s]+`.
  static Matcher WordRuns();
  // {"String": "..."} or {"Regex": "..."}.
  static Matcher FromJson(const Json& pattern, const std::string& where);

  // The text looked for, if it is plain text; else empty.
  const std::string& text() const { return text_; }

  // Calls `found` for each match from left to right, as the onig crate's find_iter: an empty match
  // right behind the last one is passed over.
  void ForEach(std::string_view text, RegexScratch& scratch, FunctionRef<void(Span)> found) const;

 private:
  enum class Kind { kRegex, kText, kSet, kWordRuns };

  Kind kind_ = Kind::kText;
  std::shared_ptr<const Regex> regex_;
  std::string text_;
  Predicate contains_ = nullptr;
};

enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
SplitBehavior ParseSplitBehavior(const std::string& name, const std::string& where);

// The pieces of `text`, from left to right, none of them empty.
void Split(std::string_view text, const Matcher& matcher, SplitBehavior behavior, bool invert,
           RegexScratch& scratch, FunctionRef<void(Span)> piece);

}  // namespace winnow::tok
