// One decoder layer over the rows of a batch: forward with a record (tape) of what its derivative
// needs, and backward from dL/d(stream after) to dL/d(stream before) and to the gradients of the
// weights that are trained. Called by TrainRun layer by layer; a tape is either kept from forward
// or made anew when backward comes to the layer.
//
// Promise: results do not depend on the number of threads.
#pragma once

#include "train/attention_gradient.h"     // AttentionGradient
#include "train/feed_forward_gradient.h"  // FeedForwardGradient

namespace winnow {

struct LayerTape {
  AttentionTape attention;
  AlignedBuffer<float> middle;  // [tokens, hidden] the stream between the blocks
  FeedForwardTape feed_forward;
};

class LayerGradient {
 public:
  LayerGradient(const ModelConfig& config, ThreadPool& pool, ComputePrecision precision);

  // after [tokens, hidden] = the layer on `before`; they may be the same. Null for
  // `after`: only the tape is made.
  void Forward(const LayerWeights& weights, const TrainBatch& batch, const float* before,
               float* after, LayerTape& tape);
  // d_stream in place; what it holds without `needs_input` is of no use.
  void Backward(const LayerWeights& weights, const TrainBatch& batch, const float* before,
                const LayerTape& tape, const BalanceLoss& balance, float* d_stream,
                const GradientSlots& slots, bool needs_input);

  static uint64_t TapeBytes(const ModelConfig& config, const LayerConfig& layer, int64_t tokens);
  static uint64_t ScratchBytes(const ModelConfig& config, int64_t tokens, int64_t longest,
                               int num_threads);

 private:
  const ModelConfig& config_;
  AttentionGradient attention_;
  FeedForwardGradient feed_forward_;
};

}  // namespace winnow
