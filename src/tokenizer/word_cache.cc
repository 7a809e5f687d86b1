#include "tokenizer/word_cache.h"

#include "tokenizer/hash_bytes.h"

namespace winnow::tok {

uint64_t WordCache::Hash(uint32_t kind, std::string_view word) {
  return MixHash(HashBytes(word) + kind) | 1;
}

bool WordCache::Find(uint32_t kind, std::string_view word, std::vector<int32_t>& ids) const {
  if (slots_.empty()) return false;
  const uint64_t hash = Hash(kind, word);
  for (size_t at = (hash >> 1) & (kSlots - 1);; at = (at + 1) & (kSlots - 1)) {
    const Slot& slot = slots_[at];
    if (slot.hash == 0) return false;
    if (slot.hash == hash && slot.kind == kind &&
        std::string_view(words_).substr(slot.word_offset, slot.word_bytes) == word) {
      const auto first = ids_.begin() + slot.ids_offset;
      ids.insert(ids.end(), first, first + slot.num_ids);
      return true;
    }
  }
}

void WordCache::Insert(uint32_t kind, std::string_view word, std::span<const int32_t> ids) {
  if (ids.size() > kMaxIds / 64) return;
  if (slots_.empty() || num_words_ >= kMaxWords || ids_.size() >= kMaxIds) Clear();
  const uint64_t hash = Hash(kind, word);
  size_t at = (hash >> 1) & (kSlots - 1);
  while (slots_[at].hash != 0) at = (at + 1) & (kSlots - 1);
  slots_[at] = {hash,
                static_cast<uint32_t>(words_.size()),
                static_cast<uint32_t>(ids_.size()),
                static_cast<uint32_t>(ids.size()),
                static_cast<uint16_t>(word.size()),
                static_cast<uint16_t>(kind)};
  words_.append(word);
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  ++num_words_;
}

void WordCache::Clear() {
  slots_.assign(kSlots, Slot{});
  num_words_ = 0;
  words_.clear();
  ids_.clear();
}

}  // namespace winnow::tok
