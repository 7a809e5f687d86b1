// The residual stream of all tokens between two layers, f32 [tokens, hidden]: in memory, or in a
// file of the working folder when the budget does not hold it. Layer-major sweeps load a tile,
// change it, store it.
#pragma once

#include <cstdint>
#include <optional>

#include "base/aligned_buffer.h"  // AlignedBuffer
#include "base/file.h"            // File, fs

namespace winnow {

class HiddenStates {
 public:
  // In memory.
  HiddenStates(int64_t num_tokens, int64_t hidden);
  // In `path`, created or (if `keep`) continued; a tile of at most `tile_tokens` is in memory.
  HiddenStates(int64_t num_tokens, int64_t hidden, int64_t tile_tokens, const fs::path& path);

  int64_t num_tokens() const { return num_tokens_; }
  bool spilled() const { return file_.has_value(); }
  // Rows [first, first + count); valid until the next Load. Changes are kept after Store.
  float* Load(int64_t first, int64_t count);
  void Store(int64_t first, int64_t count);
  // Whole stream to and from a file (checkpoints after each layer).
  void SaveTo(const fs::path& path);
  void LoadFrom(const fs::path& path);

  static uint64_t Bytes(int64_t num_tokens, int64_t hidden) {
    return static_cast<uint64_t>(num_tokens) * static_cast<uint64_t>(hidden) * sizeof(float);
  }

 private:
  int64_t num_tokens_, hidden_;
  AlignedBuffer<float> memory_;  // everything, or one tile
  std::optional<File> file_;
};

}  // namespace winnow
