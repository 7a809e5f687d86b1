// Second moments of a layer's neurons over all tokens: what a dense replacement of any of them can
// reach is decided from these sums alone (docs/METHODS.md, "Condensing by neurons"). Features are
// the inner activations silu(gate) * up of the shared expert and of every expert, un-routed; the
// target is the layer's output. Tokens count 1 / |h'|^2 times hidden, so that a few tokens with
// huge states (the first of a sequence) do not decide alone.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"  // AlignedBuffer
#include "base/thread_pool.h"     // ThreadPool

namespace winnow {

class FeatureMoments {
 public:
  FeatureMoments(int64_t num_features, int64_t hidden);

  // features [n, M], target [n, hidden]; weight [n]. Both are scaled in place by sqrt(weight).
  // Products of a call are in f32, sums of calls in double.
  void Add(float* features, float* target, const float* weight, int64_t n, ThreadPool& pool);
  // Fills the lower triangle; call once, at the end.
  void Finish();

  int64_t num_features() const { return num_features_; }
  int64_t hidden() const { return hidden_; }
  double* gram() { return gram_.data(); }    // [M, M]
  double* cross() { return cross_.data(); }  // [M, hidden], features times target
  const double* gram() const { return gram_.data(); }
  const double* cross() const { return cross_.data(); }
  const std::vector<double>& feature_sum() const { return feature_sum_; }  // [M]
  const std::vector<double>& target_sum() const { return target_sum_; }    // [hidden]
  double target_square() const { return target_square_; }
  double weight_sum() const { return weight_sum_; }

  static uint64_t Bytes(int64_t num_features, int64_t hidden, int64_t tokens_a_call);

 private:
  int64_t num_features_, hidden_;
  AlignedBuffer<double> gram_, cross_;
  std::vector<double> feature_sum_, target_sum_;
  double target_square_ = 0, weight_sum_ = 0;
  AlignedBuffer<float> transposed_, target_transposed_, product_;
};

}  // namespace winnow
