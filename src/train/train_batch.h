// Rows of tokens that go through a step together, one after the other, and what each position is
// scored against. Built by train_data, read by every gradient of train/.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace winnow {

struct TrainBatch {
  std::vector<int64_t> lengths;   // of each row
  std::vector<int32_t> ids;       // [tokens]
  std::vector<int32_t> targets;   // [tokens] the id to predict, -1: not scored
  std::vector<float> weights;     // [tokens] what the target counts for
  std::vector<uint8_t> key_mask;  // [tokens] 0: no query sees this position; empty: all count

  int64_t num_rows() const { return static_cast<int64_t>(lengths.size()); }
  int64_t num_tokens() const { return static_cast<int64_t>(ids.size()); }
  int64_t longest() const {
    return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  }
};

}  // namespace winnow
