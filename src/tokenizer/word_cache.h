// Remembers the ids of short pieces of text: natural text repeats its words. Bounded (about 3 MiB);
// when full it starts again. Not thread-safe: one per encoding thread.
#pragma once

#include <array>
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
  static constexpr size_t kInlineWords = 3;  // of 8 bytes
  static constexpr size_t kInlineIds = 6;
  static constexpr size_t kSlots = size_t{1} << 15;
  static constexpr size_t kMaxWords = kSlots / 2;
  static constexpr size_t kMaxMoreIds = size_t{1} << 17;

  struct Key {
    uint64_t hash = 0;
    // The first 24 bytes, padded with zeros.
    std::array<uint64_t, kInlineWords> head{};
  };
  // One cache line: most words need no other.
  struct alignas(64) Slot {
    Key key;  // hash 0: free
    uint16_t kind = 0;
    uint8_t word_bytes = 0;
    uint8_t num_ids = 0;
    uint32_t tail_offset = 0;  // in tails_: the bytes from the 24th on
    // The ids, or ids[0] is where they are in more_ids_.
    std::array<int32_t, kInlineIds> ids{};
  };

  static Key MakeKey(uint32_t kind, std::string_view word);
  std::string_view Tail(const Slot& slot) const;
  void Clear();

  std::vector<Slot> slots_;  // allocated with the first word
  size_t num_words_ = 0;
  std::string tails_;
  std::vector<int32_t> more_ids_;
};

}  // namespace winnow::tok
