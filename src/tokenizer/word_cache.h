// Remembers the ids of short pieces of text: natural text repeats its words. Bounded (about 3 MiB);
// when full it starts again. Not thread-safe: one per encoding thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace winnow::tok {

class WordCache {
 public:
  static constexpr size_t kMaxWordBytes = 48;

  // `kind` keeps apart pieces that reach the model by different ways. Appends to `ids` if known.
  bool Find(uint32_t kind, std::string_view word, std::vector<int32_t>& ids) const;
  // `word` must be at most kMaxWordBytes and not yet there.
  void Insert(uint32_t kind, std::string_view word, std::span<const int32_t> ids);

 private:
  struct Slot {
    uint64_t hash = 0;  // 0: free
    uint32_t word_offset = 0;
    uint32_t ids_offset = 0;
    uint32_t num_ids = 0;
    uint16_t word_bytes = 0;
    uint16_t kind = 0;
  };
  static constexpr size_t kSlots = size_t{1} << 15;
  static constexpr size_t kMaxWords = kSlots / 2;
  static constexpr size_t kMaxIds = 8 * kMaxWords;

  static uint64_t Hash(uint32_t kind, std::string_view word);
  void Clear();

  std::vector<Slot> slots_;  // allocated with the first word
  size_t num_words_ = 0;
  std::string words_;
  std::vector<int32_t> ids_;
};

}  // namespace winnow::tok
