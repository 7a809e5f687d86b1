#include "tokenizer/word_cache.h"

#include <algorithm>

#include "tokenizer/hash_bytes.h"

namespace winnow::tok {

WordCache::Key WordCache::MakeKey(uint32_t kind, std::string_view word) {
  Key key;
  uint64_t hash = word.size() << 16 | kind;
  const char* data = word.data();
  size_t left = word.size();
  for (size_t i = 0; left > 0; ++i) {
    const size_t bytes = std::min<size_t>(left, 8);
    const uint64_t value = LoadUpTo8(data, bytes);
    if (i < kInlineWords) key.head[i] = value;
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
    data += bytes;
    left -= bytes;
  }
  key.hash = hash | 1;
  return key;
}

std::string_view WordCache::Tail(const Slot& slot) const {
  constexpr size_t kHeadBytes = kInlineWords * 8;
  if (slot.word_bytes <= kHeadBytes) return {};
  return std::string_view(tails_).substr(slot.tail_offset, slot.word_bytes - kHeadBytes);
}

bool WordCache::Find(uint32_t kind, std::string_view word, std::vector<int32_t>& ids) const {
  if (slots_.empty()) return false;
  const Key key = MakeKey(kind, word);
  for (size_t at = (key.hash >> 1) & (kSlots - 1);; at = (at + 1) & (kSlots - 1)) {
    const Slot& slot = slots_[at];
    if (slot.key.hash == 0) return false;
    if (slot.key.hash != key.hash || slot.key.head != key.head || slot.kind != kind ||
        slot.word_bytes != word.size()) {
      continue;
    }
    constexpr size_t kHeadBytes = kInlineWords * 8;
    if (word.size() > kHeadBytes && Tail(slot) != word.substr(kHeadBytes)) continue;
    const int32_t* first = slot.num_ids <= kInlineIds
                               ? slot.ids.data()
                               : more_ids_.data() + static_cast<uint32_t>(slot.ids[0]);
    ids.insert(ids.end(), first, first + slot.num_ids);
    return true;
  }
}

void WordCache::Insert(uint32_t kind, std::string_view word, std::span<const int32_t> ids) {
  if (ids.size() > UINT8_MAX) return;
  if (slots_.empty() || num_words_ >= kMaxWords || more_ids_.size() >= kMaxMoreIds) Clear();
  Slot slot;
  slot.key = MakeKey(kind, word);
  slot.kind = static_cast<uint16_t>(kind);
  slot.word_bytes = static_cast<uint8_t>(word.size());
  slot.num_ids = static_cast<uint8_t>(ids.size());
  slot.tail_offset = static_cast<uint32_t>(tails_.size());
  if (word.size() > kInlineWords * 8) tails_.append(word.substr(kInlineWords * 8));
  if (ids.size() <= kInlineIds) {
    std::copy(ids.begin(), ids.end(), slot.ids.begin());
  } else {
    slot.ids[0] = static_cast<int32_t>(more_ids_.size());
    more_ids_.insert(more_ids_.end(), ids.begin(), ids.end());
  }
  size_t at = (slot.key.hash >> 1) & (kSlots - 1);
  while (slots_[at].key.hash != 0) at = (at + 1) & (kSlots - 1);
  slots_[at] = slot;
  ++num_words_;
}

void WordCache::Clear() {
  slots_.assign(kSlots, Slot{});
  num_words_ = 0;
  tails_.clear();
  more_ids_.clear();
}

}  // namespace winnow::tok
