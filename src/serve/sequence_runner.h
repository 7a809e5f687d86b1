// What the scheduler needs of a model: the operations of BatchRunner (generate/batch_runner.h,
// which states their promises), behind an interface so that queues, deadlines and prefix reuse are
// tested without a model.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "generate/batch_runner.h"  // DecodeEntry, ExpertUse

namespace winnow {

class SequenceRunner {
 public:
  using LogitsSink = std::function<void(int64_t index, std::span<const float> logits)>;

  virtual ~SequenceRunner() = default;
  virtual int64_t slots() const = 0;
  virtual int64_t context_tokens() const = 0;
  virtual int64_t vocab_size() const = 0;
  virtual void Truncate(int64_t slot, int64_t length) = 0;
  virtual void CopyPrefix(int64_t from, int64_t to, int64_t length) = 0;
  virtual void Prefill(int64_t slot, std::span<const int32_t> ids, int64_t wanted,
                       const LogitsSink& on_logits) = 0;
  virtual void Decode(std::span<const DecodeEntry> entries, std::span<float> logits) = 0;
  // Experts of the tokens of the last call.
  virtual const ExpertUse& last_experts() const = 0;
};

}  // namespace winnow
