// Outputs of every expert of one layer on every token, expert by expert, for searches that go
// through them many times: in memory, or in a file when the budget does not hold them.
#pragma once

#include <cstdint>
#include <optional>

#include "base/aligned_buffer.h"  // AlignedBuffer
#include "base/file.h"            // File, fs

namespace winnow {

class ExpertOutputs {
 public:
  // In memory; in `path` if it is not empty (created and unlinked at once).
  ExpertOutputs(int64_t num_experts, int64_t num_tokens, int64_t hidden, const fs::path& path);

  // Where rows [first, first + count) of an expert are written [count, hidden]; kept after Store.
  float* Rows(int64_t expert, int64_t first, int64_t count);
  void Store(int64_t expert, int64_t first, int64_t count);
  // The same rows to read; valid until the next call of Rows or Load.
  const float* Load(int64_t expert, int64_t first, int64_t count);
  bool spilled() const { return file_.has_value(); }

  static uint64_t Bytes(int64_t num_experts, int64_t num_tokens, int64_t hidden) {
    return static_cast<uint64_t>(num_experts) * static_cast<uint64_t>(num_tokens) *
           static_cast<uint64_t>(hidden) * sizeof(float);
  }

 private:
  uint64_t Offset(int64_t expert, int64_t first) const {
    return (static_cast<uint64_t>(expert) * static_cast<uint64_t>(num_tokens_) +
            static_cast<uint64_t>(first)) *
           static_cast<uint64_t>(hidden_);
  }
  int64_t num_tokens_, hidden_;
  AlignedBuffer<float> memory_;  // everything, or the rows in hand
  std::optional<File> file_;
};

}  // namespace winnow
