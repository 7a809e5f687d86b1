// Which tokens each slot of the runner holds, and what of them a new prompt can take over. Only
// tokens that Prefill computed count (see generate/batch_runner.h), so an answer does not depend on
// what the cache held.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "generate/token_scores.h"  // PositionScore

namespace winnow {

class SlotTable {
 public:
  struct Prefix {
    int64_t slot = -1;
    int64_t length = 0;
  };

  explicit SlotTable(int64_t slots) : slots_(static_cast<size_t>(slots)) {}

  // A free slot for a prompt, now taken: one that holds mostly a prefix of it, else the one that
  // has not been used for longest. Nothing if all are taken.
  std::optional<int64_t> Claim(std::span<const int32_t> prompt);
  void Release(int64_t slot);

  // The longest prefix any slot has, at most all but the last token. `scored`: log-probabilities of
  // the prompt's tokens are wanted, so only positions count whose scores are known.
  Prefix Longest(std::span<const int32_t> prompt, bool scored) const;
  // The prefix becomes what `slot` holds (it may be the slot's own).
  void Take(int64_t slot, Prefix prefix, bool scored);
  // Prefill has appended these tokens.
  void Append(int64_t slot, std::span<const int32_t> ids);
  // The score of the slot's next unscored position.
  void AddScore(int64_t slot, PositionScore score);
  // Forgets everything a slot holds.
  void Clear(int64_t slot);

  int64_t length(int64_t slot) const { return static_cast<int64_t>(At(slot).tokens.size()); }
  // scores[i] is that of tokens[i + 1].
  const std::vector<PositionScore>& scores(int64_t slot) const { return At(slot).scores; }

 private:
  struct Slot {
    std::vector<int32_t> tokens;
    std::vector<PositionScore> scores;
    bool taken = false;
    uint64_t last_use = 0;
  };
  Slot& At(int64_t slot) { return slots_[static_cast<size_t>(slot)]; }
  const Slot& At(int64_t slot) const { return slots_[static_cast<size_t>(slot)]; }
  static int64_t Usable(const Slot& slot, std::span<const int32_t> prompt, bool scored);

  std::vector<Slot> slots_;
  uint64_t uses_ = 0;
};

}  // namespace winnow
