#include "serve/slot_table.h"

#include <algorithm>

namespace winnow {
namespace {

int64_t CommonLength(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

}  // namespace

std::optional<int64_t> SlotTable::Claim(std::span<const int32_t> prompt) {
  Slot* oldest = nullptr;
  Slot* similar = nullptr;
  int64_t most = 0;
  for (Slot& slot : slots_) {
    if (slot.taken) continue;
    if (oldest == nullptr || slot.last_use < oldest->last_use) oldest = &slot;
    const int64_t common = CommonLength(slot.tokens, prompt);
    // A slot with little in common is worth more to whoever comes back to the rest of it.
    if (common > most && 2 * common >= static_cast<int64_t>(slot.tokens.size())) {
      most = common;
      similar = &slot;
    }
  }
  Slot* chosen = similar != nullptr ? similar : oldest;
  if (chosen == nullptr) return {};
  chosen->taken = true;
  chosen->last_use = ++uses_;
  return chosen - slots_.data();
}

void SlotTable::Release(int64_t slot) {
  At(slot).taken = false;
  At(slot).last_use = ++uses_;
}

int64_t SlotTable::Usable(const Slot& slot, std::span<const int32_t> prompt, bool scored) {
  int64_t common = CommonLength(slot.tokens, prompt);
  // The last kept position must predict a token that is the same too, and its score be known.
  if (scored) common = std::min(common - 1, static_cast<int64_t>(slot.scores.size()));
  return std::clamp<int64_t>(common, 0, static_cast<int64_t>(prompt.size()) - 1);
}

SlotTable::Prefix SlotTable::Longest(std::span<const int32_t> prompt, bool scored) const {
  Prefix best;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const int64_t length = Usable(slots_[i], prompt, scored);
    if (length > best.length) best = {static_cast<int64_t>(i), length};
  }
  return best;
}

void SlotTable::Take(int64_t slot, Prefix prefix, bool scored) {
  Slot& to = At(slot);
  const auto length = static_cast<size_t>(prefix.length);
  if (length > 0 && prefix.slot != slot) {
    to.tokens = At(prefix.slot).tokens;
    to.scores = At(prefix.slot).scores;
  }
  to.tokens.resize(length);
  // Without the check of Usable the last position may predict another token.
  to.scores.resize(std::min(to.scores.size(), scored || length == 0 ? length : length - 1));
}

void SlotTable::Append(int64_t slot, std::span<const int32_t> ids) {
  At(slot).tokens.insert(At(slot).tokens.end(), ids.begin(), ids.end());
}

void SlotTable::AddScore(int64_t slot, PositionScore score) {
  At(slot).scores.push_back(std::move(score));
}

void SlotTable::Clear(int64_t slot) {
  At(slot).tokens.clear();
  At(slot).scores.clear();
}

}  // namespace winnow
