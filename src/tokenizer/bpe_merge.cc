// The two merging loops of Bpe.
#include <algorithm>
#include <functional>
#include <limits>

#include "base/error.h"
#include "tokenizer/bpe.h"

namespace winnow::tok {

// Looks for the lowest rank again after every merge: quadratic, and the fastest for a word.
void Bpe::MergeShort(BpeScratch& scratch) const {
  std::vector<int32_t>& ids = scratch.ids;
  std::vector<uint32_t>& ranks = scratch.ranks;  // of the pair that starts at each symbol
  size_t count = ids.size();
  ranks.resize(count);
  for (size_t i = 0; i + 1 < count; ++i) ranks[i] = merges_.Rank(ids[i], ids[i + 1]);
  for (;;) {
    uint32_t lowest = MergeTable::kNone;
    size_t at = 0;
    for (size_t i = 0; i + 1 < count; ++i) {
      if (ranks[i] < lowest) {
        lowest = ranks[i];
        at = i;
      }
    }
    if (lowest == MergeTable::kNone) break;
    ids[at] = merged_ids_[lowest];
    --count;
    std::copy(ids.begin() + static_cast<ptrdiff_t>(at) + 2,
              ids.begin() + static_cast<ptrdiff_t>(count) + 1,
              ids.begin() + static_cast<ptrdiff_t>(at) + 1);
    std::copy(ranks.begin() + static_cast<ptrdiff_t>(at) + 2,
              ranks.begin() + static_cast<ptrdiff_t>(count) + 1,
              ranks.begin() + static_cast<ptrdiff_t>(at) + 1);
    if (at > 0) ranks[at - 1] = merges_.Rank(ids[at - 1], ids[at]);
    if (at + 1 < count) ranks[at] = merges_.Rank(ids[at], ids[at + 1]);
  }
  ids.resize(count);
}

// A queue of possible merges by (rank, position), whose entries are checked when they come up: the
// library's algorithm. O(n log n).
void Bpe::MergeLong(BpeScratch& scratch) const {
  constexpr uint32_t kEnd = std::numeric_limits<uint32_t>::max();
  constexpr int32_t kGone = -1;
  std::vector<int32_t>& ids = scratch.ids;
  if (ids.size() >= kEnd) throw RuntimeError("a piece of text is too long to be tokenized");
  const auto count = static_cast<uint32_t>(ids.size());
  scratch.next.resize(count);
  scratch.previous.resize(count);
  std::vector<uint64_t>& queue = scratch.queue;
  queue.clear();
  const auto entry = [](uint32_t rank, uint32_t position) {
    return static_cast<uint64_t>(rank) << 32 | position;
  };
  for (uint32_t i = 0; i < count; ++i) {
    scratch.previous[i] = i == 0 ? kEnd : i - 1;
    scratch.next[i] = i + 1 == count ? kEnd : i + 1;
    if (i + 1 == count) break;
    const uint32_t rank = merges_.Rank(ids[i], ids[i + 1]);
    if (rank != MergeTable::kNone) queue.push_back(entry(rank, i));
  }
  std::make_heap(queue.begin(), queue.end(), std::greater<>());
  const auto push = [&](uint32_t left, uint32_t right) {
    const uint32_t rank = merges_.Rank(ids[left], ids[right]);
    if (rank == MergeTable::kNone) return;
    queue.push_back(entry(rank, left));
    std::push_heap(queue.begin(), queue.end(), std::greater<>());
  };
  while (!queue.empty()) {
    const uint64_t top = queue.front();
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    queue.pop_back();
    const auto position = static_cast<uint32_t>(top);
    const int32_t merged_id = merged_ids_[top >> 32];
    if (ids[position] == kGone || scratch.next[position] == kEnd) continue;
    const uint32_t right = scratch.next[position];
    const uint32_t rank = merges_.Rank(ids[position], ids[right]);
    if (rank == MergeTable::kNone || merged_ids_[rank] != merged_id) continue;  // out of date
    ids[position] = merged_id;
    ids[right] = kGone;
    const uint32_t after = scratch.next[right];
    scratch.next[position] = after;
    if (after != kEnd) scratch.previous[after] = position;
    if (scratch.previous[position] != kEnd) push(scratch.previous[position], position);
    if (after != kEnd) push(position, after);
  }
  std::erase(ids, kGone);
}

}  // namespace winnow::tok
