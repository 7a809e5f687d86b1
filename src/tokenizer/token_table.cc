#include "tokenizer/token_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "base/error.h"
#include "tokenizer/hash_bytes.h"

namespace winnow::tok {

TokenTable::TokenTable(std::string arena, std::vector<Entry> entries, const std::string& where)
    : arena_(std::move(arena)), entries_(std::move(entries)) {
  const auto by_id = [](const Entry& a, const Entry& b) { return a.id < b.id; };
  if (!std::is_sorted(entries_.begin(), entries_.end(), by_id)) {
    std::sort(entries_.begin(), entries_.end(), by_id);
  }
  for (size_t i = 1; i < entries_.size(); ++i) {
    if (entries_[i].id == entries_[i - 1].id) {
      throw ModelError(fmt::format("{}: tokens \"{}\" and \"{}\" have the same id {}", where,
                                   TextOf(entries_[i - 1]).substr(0, 100),
                                   TextOf(entries_[i]).substr(0, 100), entries_[i].id));
    }
  }
  slots_.resize(std::bit_ceil(entries_.size() * 2 + 1));
  const size_t mask = slots_.size() - 1;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const std::string_view token = TextOf(entries_[i]);
    const uint64_t hash = HashBytes(token);
    const auto high = static_cast<uint32_t>(hash >> 32);
    size_t slot = hash & mask;
    for (; slots_[slot].entry != 0; slot = (slot + 1) & mask) {
      if (slots_[slot].hash == high && TextOf(entries_[slots_[slot].entry - 1]) == token) {
        throw ModelError(
            fmt::format("{}: token \"{}\" appears twice", where, token.substr(0, 100)));
      }
    }
    slots_[slot] = {static_cast<uint32_t>(i + 1), high};
  }
}

int32_t TokenTable::Find(std::string_view token) const {
  if (slots_.empty()) return kNone;
  const size_t mask = slots_.size() - 1;
  const uint64_t hash = HashBytes(token);
  for (size_t slot = hash & mask; slots_[slot].entry != 0; slot = (slot + 1) & mask) {
    if (slots_[slot].hash != static_cast<uint32_t>(hash >> 32)) continue;
    const Entry& entry = entries_[slots_[slot].entry - 1];
    if (TextOf(entry) == token) return entry.id;
  }
  return kNone;
}

std::string_view TokenTable::Token(int32_t id) const {
  const Entry* entry = EntryOf(id);
  return entry == nullptr ? std::string_view() : TextOf(*entry);
}

const TokenTable::Entry* TokenTable::EntryOf(int32_t id) const {
  // Ids are nearly always 0 .. n-1.
  const auto index = static_cast<size_t>(static_cast<uint32_t>(id));
  if (index < entries_.size() && entries_[index].id == id) return &entries_[index];
  const auto found =
      std::lower_bound(entries_.begin(), entries_.end(), id,
                       [](const Entry& entry, int32_t wanted) { return entry.id < wanted; });
  return found != entries_.end() && found->id == id ? &*found : nullptr;
}

}  // namespace winnow::tok
