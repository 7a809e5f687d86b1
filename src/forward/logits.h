// From the residual stream after the last layer to next-token scores: final norm and lm_head.
#pragma once

#include <cstdint>
#include <span>

#include "base/thread_pool.h"  // ThreadPool
#include "model/model.h"       // Model

namespace winnow {

// Rows of the vocabulary multiplied at once: bounds what of lm_head is in memory. A constant,
// because it fixes how log-sum-exps are combined.
inline constexpr int64_t kVocabularyChunk = 8192;

// hidden [n, hidden_size] -> logits [n, vocab_size]. Reads lm_head from disk once, in chunks.
void ComputeLogits(const Model& model, ThreadPool& pool, const float* hidden, int64_t n,
                   float* logits);

}  // namespace winnow
