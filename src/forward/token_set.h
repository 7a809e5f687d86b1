// The tokens a sweep runs over: sequences one after the other, each with its own positions from 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace winnow {

struct TokenSet {
  std::vector<int32_t> ids;            // all sequences joined
  std::vector<int64_t> offsets = {0};  // [sequences + 1]

  int64_t num_sequences() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t num_tokens() const { return offsets.back(); }
  int64_t length(int64_t sequence) const {
    return offsets[static_cast<size_t>(sequence) + 1] - offsets[static_cast<size_t>(sequence)];
  }
  int64_t longest() const {
    int64_t longest = 0;
    for (int64_t i = 0; i < num_sequences(); ++i) longest = std::max(longest, length(i));
    return longest;
  }
  // All sequences of a list with its own offsets [n + 1]; empty ones are none.
  void AppendAll(std::span<const int32_t> all, std::span<const int64_t> bounds) {
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      if (bounds[i + 1] > bounds[i]) {
        Append(all.subspan(static_cast<size_t>(bounds[i]),
                           static_cast<size_t>(bounds[i + 1] - bounds[i])));
      }
    }
  }
  void Append(std::span<const int32_t> sequence) {
    ids.insert(ids.end(), sequence.begin(), sequence.end());
    offsets.push_back(static_cast<int64_t>(ids.size()));
  }
};

// A run of whole sequences that goes through a layer together.
struct SequenceTile {
  int64_t first_sequence = 0, num_sequences = 0;
  int64_t first_token = 0, num_tokens = 0;
  std::vector<int64_t> lengths;
};

// Whole sequences up to `tile_tokens` a tile (a longer sequence is a tile of its own).
std::vector<SequenceTile> SplitIntoTiles(const TokenSet& tokens, int64_t tile_tokens);

}  // namespace winnow
