// One client's request as the scheduler sees it: sequences to run, and the channel on which what
// they yield comes back. The server's connection thread waits on the channel; the scheduler's
// thread fills it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "generate/generator.h"     // SamplingOptions
#include "generate/logit_rules.h"   // LogitRules
#include "generate/token_scores.h"  // PositionScore
#include "serve/api_error.h"        // ApiError

namespace winnow {

// One sequence to run: a prompt and one continuation of it.
struct SequenceSpec {
  std::vector<int32_t> prompt;  // at least one token
  int64_t max_tokens = 16;      // 0: only the prompt
  SamplingOptions sampling = {};
  LogitRules rules = {};
  std::vector<std::string> stop = {};
  bool stop_at_eos = true;
  std::optional<int> top_logprobs = {};  // log-probabilities of generated tokens
  bool score_prompt = false;             // those of the prompt's tokens too
};

// Experts of one token: ids [MoE layers, k], best first, ~id where one was skipped
// (forward/expert_skipping.h).
using TokenExperts = std::vector<int32_t>;

struct GeneratedToken {
  int32_t id = 0;
  int64_t text_offset = 0;  // characters of the continuation before it
  std::optional<PositionScore> score;
  TokenExperts experts;  // of the step that chose the token
};

enum class FinishReason { kStop, kLength };

struct SequenceTimings {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt, taken from the prefix cache
  int64_t generated_tokens = 0;
  double prompt_seconds = 0, generation_seconds = 0;
  double experts_per_token = 0;  // run per MoE layer, mean over the generated tokens
};

// A piece of one sequence's answer.
struct SequenceEvent {
  size_t sequence = 0;
  std::vector<PositionScore> prompt_scores;  // [prompt - 1], in one piece before any text
  std::string text;
  std::vector<GeneratedToken> tokens;  // all that were drawn since the last event
  std::optional<FinishReason> finished;
  SequenceTimings timings;  // with `finished`
};

class Generation {
 public:
  using Clock = std::chrono::steady_clock;

  Generation(std::vector<SequenceSpec> specs, std::optional<Clock::time_point> deadline)
      : specs_(std::move(specs)), unfinished_(specs_.size()), deadline_(deadline) {}

  // For the waiting client. Nothing when `patience` has passed without an event; throws the
  // ApiError the request ended with, after the events before it.
  std::optional<SequenceEvent> Next(std::chrono::milliseconds patience);
  // All sequences have ended and all events were taken. A request that failed never finishes.
  bool finished() const;
  // Nobody waits any longer.
  void Cancel() { cancelled_ = true; }

  // For the scheduler.
  const std::vector<SequenceSpec>& specs() const { return specs_; }
  const std::optional<Clock::time_point>& deadline() const { return deadline_; }
  bool cancelled() const { return cancelled_; }
  void Put(SequenceEvent event);
  void Fail(const ApiError& error);
  bool failed() const;

 private:
  const std::vector<SequenceSpec> specs_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<SequenceEvent> events_;
  std::optional<ApiError> failure_;
  size_t unfinished_;
  const std::optional<Clock::time_point> deadline_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace winnow
