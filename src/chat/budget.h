// What one rendering may use. Templates come from a stranger's file: one that loops for ever,
// doubles a string or calls itself has to end with a message. Every node that is evaluated, every
// element that is visited and every byte of text that is made or searched is counted here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chat/problem.h"  // Problem

namespace winnow::chat {

// Lists in lists, and calls in calls. JSON has at most 64 levels (base/json.h).
inline constexpr int kMaxValueDepth = 100;
inline constexpr int kMaxEvaluationDepth = 700;

class Budget {
 public:
  // A published template takes some thousand steps and copies its input a few dozen times.
  explicit Budget(uint64_t input_bytes)
      : steps_(10'000'000 + input_bytes), bytes_((uint64_t{256} << 20) + 64 * input_bytes) {}

  void UseSteps(uint64_t count) {
    if (count > steps_) throw Problem("rendering takes too many steps");
    steps_ -= count;
  }
  void UseBytes(uint64_t count) {
    if (count > bytes_) throw Problem("rendering makes too much text");
    bytes_ -= count;
  }

 private:
  uint64_t steps_;
  uint64_t bytes_;
};

}  // namespace winnow::chat
