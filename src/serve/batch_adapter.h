// A BatchRunner as the scheduler sees it.
#pragma once

#include "generate/batch_runner.h"  // BatchRunner
#include "serve/sequence_runner.h"  // SequenceRunner

namespace winnow {

class BatchAdapter : public SequenceRunner {
 public:
  // Turns the recording of experts on: metrics count them. `runner` must outlive it.
  explicit BatchAdapter(BatchRunner& runner) : runner_(runner) { runner_.RecordExperts(true); }
  int64_t slots() const override { return runner_.slots(); }
  int64_t context_tokens() const override { return runner_.context_tokens(); }
  int64_t vocab_size() const override { return runner_.vocab_size(); }
  void Truncate(int64_t slot, int64_t length) override { runner_.Truncate(slot, length); }
  void CopyPrefix(int64_t from, int64_t to, int64_t length) override {
    runner_.CopyPrefix(from, to, length);
  }
  void Prefill(int64_t slot, std::span<const int32_t> ids, int64_t wanted,
               const LogitsSink& on_logits) override {
    runner_.Prefill(slot, ids, wanted, on_logits);
  }
  void Decode(std::span<const DecodeEntry> entries, std::span<float> logits) override {
    runner_.Decode(entries, logits);
  }
  const ExpertUse& last_experts() const override { return runner_.last_experts(); }

 private:
  BatchRunner& runner_;
};

}  // namespace winnow
