// How library code reports progress without printing: cli/ passes a sink, tests pass nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

namespace winnow {

struct ProgressEvent {
  std::string stage;  // "observe", "eval", ...
  int64_t layer = 0;  // finished layers
  int64_t num_layers = 0;
  int64_t work_done = 0;  // tokens x layers (or bytes) finished
  int64_t work_total = 0;
  bool bytes = false;     // work counts bytes instead of tokens x layers
  std::string note = {};  // shown behind the numbers, e.g. a loss
};

// Everything a long computation needs to talk to its caller. `interrupted` is polled between tiles.
struct JobControl {
  std::function<void(const ProgressEvent&)> on_progress;
  std::function<void(const std::string&)> on_warning;
  const std::atomic<bool>* interrupted = nullptr;

  void Report(const ProgressEvent& event) const {
    if (on_progress) on_progress(event);
  }
  void Warn(const std::string& message) const {
    if (on_warning) on_warning(message);
  }
  // Throws InterruptedError if the user asked to stop.
  void Poll() const;
};

}  // namespace winnow
