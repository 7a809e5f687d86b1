// Ends a growing text at the first of a list of stop strings, wherever the pieces are cut. Text
// that may yet become a stop string is held back.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace winnow {

class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);
  // Adds a piece; returns what can be shown now. Nothing more comes once stopped().
  std::string Put(std::string_view piece);
  // The text ends here: what was held back.
  std::string Finish();
  // A stop string was met; it and what follows it are not part of the text.
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace winnow
