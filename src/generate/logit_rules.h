// What a request may do to a row of logits before a token is drawn from it: biases, penalties for
// tokens that were there before, a floor under the probability. The server's scheduler calls it
// with a copy of the row; log-probabilities are taken from the row as the model gave it.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

namespace winnow {

struct LogitRules {
  std::vector<std::pair<int32_t, float>> logit_bias = {};  // added to the logit of the id
  float presence_penalty = 0;    // subtracted once from tokens generated before
  float frequency_penalty = 0;   // subtracted for each time a token was generated
  float repetition_penalty = 1;  // divides a positive logit of any token seen, multiplies others
  float min_p = 0;               // drops tokens less likely than this share of the likeliest

  bool empty() const {
    return logit_bias.empty() && presence_penalty == 0 && frequency_penalty == 0 &&
           repetition_penalty == 1 && min_p == 0;
  }
};

// The tokens of one sequence, as the penalties count them.
class TokenHistory {
 public:
  explicit TokenHistory(std::span<const int32_t> prompt) : prompt_(prompt.begin(), prompt.end()) {}
  void Add(int32_t token) { ++generated_[token]; }
  const std::set<int32_t>& prompt() const { return prompt_; }
  const std::map<int32_t, int64_t>& generated() const { return generated_; }

 private:
  std::set<int32_t> prompt_;
  std::map<int32_t, int64_t> generated_;
};

// Changes logits [V] in place. Ids outside the row are ignored. What min_p drops becomes -inf; it
// looks at probabilities at `temperature` (0 or less: nothing to drop, the likeliest is taken).
void ApplyLogitRules(const LogitRules& rules, const TokenHistory& history, float temperature,
                     std::span<float> logits);

}  // namespace winnow
