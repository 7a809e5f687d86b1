// The vocabulary: token <-> id, in flat arrays.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace winnow::tok {

class TokenTable {
 public:
  static constexpr int32_t kNone = -1;

  struct Entry {
    uint32_t offset;
    uint32_t bytes;
    int32_t id;
  };

  TokenTable() = default;
  // Entries point into `arena`. Throws ModelError naming `where` if a token or an id repeats.
  TokenTable(std::string arena, std::vector<Entry> entries, const std::string& where);

  size_t size() const { return entries_.size(); }
  int32_t max_id() const { return entries_.empty() ? kNone : entries_.back().id; }
  // kNone if absent.
  int32_t Find(std::string_view token) const;
  bool HasId(int32_t id) const { return EntryOf(id) != nullptr; }
  // Empty if there is no such id.
  std::string_view Token(int32_t id) const;

 private:
  std::string_view TextOf(const Entry& entry) const {
    return std::string_view(arena_).substr(entry.offset, entry.bytes);
  }
  const Entry* EntryOf(int32_t id) const;

  std::string arena_;
  std::vector<Entry> entries_;  // by id; never indexed by an id from a file without a check
  struct Slot {
    uint32_t entry = 0;  // index + 1, 0 is free
    uint32_t hash = 0;   // the high half: spares looking at the text of other tokens
  };
  std::vector<Slot> slots_;  // open addressing
};

}  // namespace winnow::tok
