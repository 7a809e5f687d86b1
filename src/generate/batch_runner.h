// Many sequences through one model in memory: prompts in chunks, then one token each for any number
// of them together. What serve/ schedules and run, bench and Generate drive; it knows no requests,
// no sampling and no clock.
//
// Promise (tests hold it bitwise): a sequence's logits depend on its own tokens alone, not on the
// other sequences of a call, the slot, the number of threads or the length of the chunks. Tokens
// given to Prefill and tokens given to Decode use different kernels and may differ in the last
// bits, so whoever keeps a prefix for later keeps what Prefill computed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/memory.h"              // MemoryPlan
#include "base/progress.h"            // JobControl
#include "base/thread_pool.h"         // ThreadPool
#include "forward/expert_skipping.h"  // SkipBetas, SkipCounts
#include "kernels/matmul.h"           // ComputePrecision
#include "model/model.h"              // Model

namespace winnow {

struct BatchOptions {
  int64_t slots = 1;             // sequences that can be held at once
  int64_t context_tokens = 512;  // most tokens of one sequence
  uint64_t memory_budget_bytes = 0;
  ComputePrecision compute = ComputePrecision::kF32;  // of Prefill
  std::vector<std::vector<int32_t>> kept_experts = {};
  SkipBetas skip_betas = {};  // empty: every expert runs
};

// One sequence's next token.
struct DecodeEntry {
  int64_t slot = 0;
  int32_t token = 0;
};

// Which experts the tokens of the last call used: ids [tokens, MoE layers, k], best first, ~id
// where one was skipped (forward/expert_skipping.h).
struct ExpertUse {
  int64_t moe_layers = 0;
  int64_t experts_per_token = 0;  // k
  std::vector<int32_t> ids;
};

class BatchRunner {
 public:
  // Most tokens of one Prefill call.
  static constexpr int64_t kChunkTokens = 512;

  // What it would hold; the caller compares it with the budget. The first line is the weights.
  static MemoryPlan Plan(const Model& model, const BatchOptions& options, int num_threads);
  // The most slots (at most `wanted`) whose plan fits `memory_budget_bytes`; 0 if not even one
  // does.
  static int64_t SlotsThatFit(const Model& model, BatchOptions options, int64_t wanted,
                              int num_threads);

  // Reads all weights. `model` and `pool` must outlive it. Not thread-safe: one caller at a time.
  // `control` is polled between layers; a call that it ends by throwing leaves every length as it
  // was before the call.
  BatchRunner(const Model& model, BatchOptions options, ThreadPool& pool,
              const JobControl& control);
  ~BatchRunner();

  int64_t slots() const;
  int64_t context_tokens() const;
  int64_t vocab_size() const;

  // Tokens the slot holds.
  int64_t length(int64_t slot) const;
  // Forgets all but the first `length` tokens.
  void Truncate(int64_t slot, int64_t length);
  // The first `length` tokens of `from` become those of `to`, which is emptied before.
  void CopyPrefix(int64_t from, int64_t to, int64_t length);

  // Appends 1..kChunkTokens prompt tokens to a slot. For the last `wanted` of them on_logits is
  // called in order with the token's index in `ids` and its logits [vocab_size], valid during the
  // call. UsageError for ids outside the vocabulary, RuntimeError if the slot has no room.
  void Prefill(int64_t slot, std::span<const int32_t> ids, int64_t wanted,
               const std::function<void(int64_t index, std::span<const float> logits)>& on_logits);

  // Appends one token to each of the named slots (each at most once); logits [entries, vocab_size].
  void Decode(std::span<const DecodeEntry> entries, std::span<float> logits);

  // Of the tokens of the last call (off by default).
  void RecordExperts(bool on);
  const ExpertUse& last_experts() const;
  // Experts kept and skipped so far, if there are thresholds.
  SkipCounts skip_counts() const;
  // Bytes of weights one decoded token reads on average: all but the experts that were not
  // selected. Known after the first Decode.
  double mean_bytes_per_token() const;
  double mean_experts_per_token() const;  // over MoE layers

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace winnow
