#include "train/layer_gradient.h"

namespace winnow {

LayerGradient::LayerGradient(const ModelConfig& config, ThreadPool& pool,
                             ComputePrecision precision)
    : config_(config),
      attention_(config, pool, precision),
      feed_forward_(config, pool, precision) {}

void LayerGradient::Forward(const LayerWeights& weights, const TrainBatch& batch,
                            const float* before, float* after, LayerTape& tape) {
  const int64_t count = batch.num_tokens() * config_.hidden_size;
  GrowBuffer(tape.middle, count);
  attention_.Forward(weights, batch, before, tape.middle.data(), tape.attention);
  if (after != nullptr) std::copy_n(tape.middle.data(), count, after);
  feed_forward_.Forward(weights, batch.num_tokens(), tape.middle.data(), after, tape.feed_forward);
}

void LayerGradient::Backward(const LayerWeights& weights, const TrainBatch& batch,
                             const float* before, const LayerTape& tape, const BalanceLoss& balance,
                             float* d_stream, const GradientSlots& slots, bool needs_input) {
  const bool needs_middle = needs_input || slots.any_attention();
  feed_forward_.Backward(weights, batch, tape.middle.data(), tape.feed_forward, balance, d_stream,
                         slots, needs_middle);
  if (!needs_middle) return;
  attention_.Backward(weights, batch, before, tape.attention, d_stream, slots, needs_input);
}

uint64_t LayerGradient::TapeBytes(const ModelConfig& config, const LayerConfig& layer,
                                  int64_t tokens) {
  return AttentionGradient::TapeBytes(config, tokens) +
         FeedForwardGradient::TapeBytes(config, layer, tokens) +
         static_cast<uint64_t>(tokens) * static_cast<uint64_t>(config.hidden_size) * sizeof(float);
}

uint64_t LayerGradient::ScratchBytes(const ModelConfig& config, int64_t tokens, int64_t longest,
                                     int num_threads) {
  return AttentionGradient::ScratchBytes(config, tokens, longest, num_threads) +
         FeedForwardGradient::ScratchBytes(config, tokens);
}

}  // namespace winnow
