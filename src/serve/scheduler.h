// Continuous batching: requests wait in a bounded queue, their sequences move into the runner's
// slots as those get free, and each turn gives one token to every sequence that generates and at
// most one chunk to one prompt. A slot keeps its prompt when it gets free, and a new prompt takes
// over the longest beginning that any slot holds.
//
// Promise: what a sequence yields depends on its spec alone: not on other requests, on the slot or
// on what the slots held before. Chunks of a prompt begin at multiples of chunk_tokens of the
// request's own tokens (the first after a known prefix may be shorter).
//
// Submit, BeginStop and counts may be called from any thread; Step or Run from one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "serve/generation.h"        // Generation
#include "serve/metrics.h"           // Metrics, SchedulerCounts
#include "serve/running_sequence.h"  // RunningSequence, VocabularyRules
#include "serve/sequence_runner.h"   // SequenceRunner
#include "serve/slot_table.h"        // SlotTable

namespace winnow {

struct SchedulerOptions {
  int64_t max_queued_requests = 64;
  // Prompt tokens of all requests that are not over yet; one request alone may have more.
  int64_t max_prompt_tokens = INT64_MAX;
  int64_t chunk_tokens = 256;  // at most BatchRunner::kChunkTokens
  bool reuse_prefixes = true;
  VocabularyRules vocabulary = {};
  // Set by whoever stops the server at once: everything running ends with status 503. The same
  // flag interrupts the runner (JobControl). May be null.
  const std::atomic<bool>* abandoned = nullptr;
  // The clock of deadlines; tests have their own.
  std::function<Generation::Clock::time_point()> now = [] { return Generation::Clock::now(); };
  // Faults that a client is told of only in part; called on the scheduler's thread.
  std::function<void(const std::string&)> on_fault = {};
};

class Scheduler {
 public:
  // All must outlive it.
  Scheduler(SequenceRunner& runner, const Tokenizer& tokenizer, SchedulerOptions options,
            Metrics& metrics);

  // Queues a request. ApiError 400 if a prompt does not fit the context, 429 if the queue is full
  // or the prompts of other requests are too long together, 503 if the server is stopping. Prompts
  // must be within the vocabulary. max_tokens is lowered to what the context has room for.
  std::shared_ptr<Generation> Submit(std::vector<SequenceSpec> specs,
                                     std::optional<Generation::Clock::time_point> deadline);

  // One turn; false if there was nothing to do.
  bool Step();
  // Turns until BeginStop was called and everything that ran has ended.
  void Run();
  // No new requests; those that wait end with 503, those that run go on.
  void BeginStop();

  int64_t context_tokens() const { return runner_.context_tokens(); }
  int64_t vocab_size() const { return runner_.vocab_size(); }
  Generation::Clock::time_point now() const { return options_.now(); }

 private:
  struct Waiting {
    std::shared_ptr<Generation> generation;
    size_t next = 0;  // its first sequence that has no slot yet
  };
  using Running = std::unique_ptr<RunningSequence>;

  void EndWithoutClient();
  bool EndIfUnwanted(Generation& generation);
  void Admit();
  bool PrefillOne();
  void PrepareSlot(RunningSequence& sequence);
  void PrefillChunk(RunningSequence& sequence);
  bool DecodeAll();
  TokenExperts ExpertsOf(int64_t token) const;
  void CountExperts();
  void Fail(Generation& generation, const std::exception& error);
  void RemoveFinished();
  void Publish();

  SequenceRunner& runner_;
  const Tokenizer& tokenizer_;
  const SchedulerOptions options_;
  Metrics& metrics_;
  SlotTable slots_;
  std::list<Running> running_;  // in the order of admission
  std::vector<float> logits_;   // [slots, V]
  SchedulerCounts counts_;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<Waiting> queue_;
  bool stopping_ = false;
  uint64_t refused_ = 0;
  // Of the requests that the scheduler or a client still holds; outlives both.
  const std::shared_ptr<std::atomic<int64_t>> prompt_tokens_ =
      std::make_shared<std::atomic<int64_t>>(0);
};

}  // namespace winnow
