// What the down projections of a layer multiply, for all tokens that are fitted: for each expert
// the rows w_t,e * silu(gate) * up of the tokens that use it. In memory, or in a file when the
// budget does not hold them. Filled by the forward pass, read by the refit chunk by chunk.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"   // AlignedBuffer
#include "base/file.h"             // File, fs
#include "forward/moe_observer.h"  // ExpertRows

namespace winnow {

class ActivationStore {
 public:
  struct Block {
    int32_t expert = 0;  // position among the layer's experts, -1: the shared one
    int64_t width = 0;
    std::vector<int32_t> tokens;  // ascending
  };

  // In memory.
  ActivationStore() = default;
  // In `path`, created and unlinked at once: it disappears with the object.
  explicit ActivationStore(const fs::path& path);

  // Rows of later tokens than those before, scaled by their weights.
  void Append(const ExpertRows& rows);
  // In the order in which experts first appeared.
  const std::vector<Block>& blocks() const { return blocks_; }
  // Columns [first_column, + columns) of `count` rows of a block as [count, columns].
  void Read(size_t block, int64_t first_row, int64_t count, int64_t first_column, int64_t columns,
            float* out) const;

 private:
  struct Piece {
    int64_t first_row = 0, rows = 0;
    AlignedBuffer<float> data;  // [rows, width], or empty and
    uint64_t file_offset = 0;   // where it is in the file
  };
  std::vector<Block> blocks_;
  std::vector<std::vector<Piece>> pieces_;  // of each block
  std::optional<File> file_;
  uint64_t file_bytes_ = 0;
};

}  // namespace winnow
