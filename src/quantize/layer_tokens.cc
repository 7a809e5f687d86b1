#include "quantize/layer_tokens.h"

#include <algorithm>
#include <cstring>

#include "forward/router.h"
#include "kernels/elementwise.h"
#include "quantize/input_moments.h"

namespace winnow {
namespace {

// h / |x + y|^2, y null or of the same length: near 1 for a stream of unit squares.
float InverseSquare(const float* x, const float* y, int64_t h) {
  double norm = 0;
  for (int64_t i = 0; i < h; ++i) {
    const double value =
        static_cast<double>(x[i]) + (y != nullptr ? static_cast<double>(y[i]) : 0.0);
    norm += value * value;
  }
  return norm > 0 ? static_cast<float>(static_cast<double>(h) / norm) : 0.0f;
}

// What tokens count by the stream after the layer.
class OutputWeights : public MoeObserver {
 public:
  explicit OutputWeights(std::vector<float>& weights) : weights_(weights) {}
  bool WantsExpertRows() const override { return true; }  // layers without a router too
  void OnTokens(const MoeTokens& m) override {
    for (int64_t t = 0; t < m.num_tokens; ++t) {
      weights_[static_cast<size_t>(m.first_token + t)] =
          InverseSquare(m.residual + t * m.hidden, m.output + t * m.hidden, m.hidden);
    }
  }

 private:
  std::vector<float>& weights_;
};

}  // namespace

LayerTokens::LayerTokens(const ModelConfig& config, HiddenStates& stream,
                         const std::vector<SequenceTile>& tiles, ThreadPool& pool)
    : config_(config), stream_(stream), tiles_(tiles), pool_(pool) {
  const auto count = static_cast<size_t>(stream.num_tokens());
  all_.tokens.resize(count);
  all_.weights.resize(count);
  for (size_t i = 0; i < count; ++i) all_.tokens[i] = static_cast<int32_t>(i);
}

void LayerTokens::WeighByStream() {
  const int64_t h = config_.hidden_size;
  for (const SequenceTile& tile : tiles_) {
    const float* hidden = stream_.Load(tile.first_token, tile.num_tokens);
    for (int64_t t = 0; t < tile.num_tokens; ++t) {
      all_.weights[static_cast<size_t>(tile.first_token + t)] =
          InverseSquare(hidden + t * h, nullptr, h);
    }
  }
}

void LayerTokens::Route(int64_t layer, const LayerWeights& weights, LayerSweep& sweep) {
  OutputWeights after(all_.weights);
  experts_.assign(weights.experts.size(), {});
  for (const SequenceTile& tile : tiles_) {
    float* hidden = stream_.Load(tile.first_token, tile.num_tokens);
    sweep.RunFeedForward(weights,
                         {.layer = layer,
                          .first_token = tile.first_token,
                          .observer = &after,
                          .add_to_residual = false},
                         tile.num_tokens, hidden);
    if (!weights.router.empty()) RouteTile(weights, tile, hidden);
  }
  if (weights.router.empty()) std::fill(experts_.begin(), experts_.end(), all_);
}

void LayerTokens::RouteTile(const LayerWeights& weights, const SequenceTile& tile,
                            const float* hidden) {
  const int64_t h = config_.hidden_size, k = config_.num_experts_per_tok;
  const int64_t num_experts = weights.num_experts();
  normed_.resize(static_cast<size_t>(kMomentRows * h));
  logits_.resize(static_cast<size_t>(kMomentRows * num_experts));
  topk_ids_.resize(static_cast<size_t>(kMomentRows * k));
  topk_weights_.resize(topk_ids_.size());
  for (int64_t first = 0; first < tile.num_tokens; first += kMomentRows) {
    const int64_t n = std::min(kMomentRows, tile.num_tokens - first);
    RmsNorm(hidden + first * h, n, h, h, weights.post_attention_norm.data(), config_.rms_norm_eps,
            normed_.data(), h);
    packed_.Pack(normed_.data(), n, h, h, pool_);
    MatMul(packed_, weights.router, logits_.data(), num_experts, pool_);
    SelectExperts(config_, logits_.data(), n, num_experts, topk_ids_.data(), topk_weights_.data());
    for (int64_t i = 0; i < n * k; ++i) {
      const int32_t token = static_cast<int32_t>(tile.first_token + first + i / k);
      const int32_t expert = topk_ids_[static_cast<size_t>(i)];
      const float weight = topk_weights_[static_cast<size_t>(i)];
      WeightedTokens& to = experts_[static_cast<size_t>(expert)];
      to.tokens.push_back(token);
      to.weights.push_back(weight * weight * all_.weights[static_cast<size_t>(token)]);
    }
  }
}

WeightedTokens LayerTokens::Spaced(int64_t count) const {
  const auto total = static_cast<int64_t>(all_.tokens.size());
  const int64_t step = std::max<int64_t>(1, (total + count - 1) / count);
  WeightedTokens spaced;
  for (int64_t t = step / 2; t < total; t += step) {
    spaced.tokens.push_back(static_cast<int32_t>(t));
    spaced.weights.push_back(all_.weights[static_cast<size_t>(t)]);
  }
  return spaced;
}

void LayerTokens::ForNormedRows(
    const WeightedTokens& tokens, const std::vector<float>& norm,
    const std::function<void(const float*, const float*, int64_t)>& visit) {
  const int64_t h = config_.hidden_size;
  rows_.resize(static_cast<size_t>(kMomentRows * h));
  const auto total = static_cast<int64_t>(tokens.tokens.size());
  int64_t at = 0;
  for (const SequenceTile& tile : tiles_) {
    if (at == total) break;
    const int64_t end = tile.first_token + tile.num_tokens;
    if (tokens.tokens[static_cast<size_t>(at)] >= end) continue;
    const float* hidden = stream_.Load(tile.first_token, tile.num_tokens);
    while (at < total && tokens.tokens[static_cast<size_t>(at)] < end) {
      int64_t n = 0;
      const int64_t first = at;
      for (; at < total && n < kMomentRows && tokens.tokens[static_cast<size_t>(at)] < end; ++at) {
        const int64_t row = tokens.tokens[static_cast<size_t>(at)] - tile.first_token;
        std::memcpy(rows_.data() + n++ * h, hidden + row * h,
                    static_cast<size_t>(h) * sizeof(float));
      }
      RmsNorm(rows_.data(), n, h, h, norm.data(), config_.rms_norm_eps, rows_.data(), h);
      visit(rows_.data(), tokens.weights.data() + first, n);
    }
  }
}

uint64_t LayerTokens::Bytes(const ModelConfig& config, int64_t num_tokens, int64_t largest_tile) {
  const auto tokens = static_cast<uint64_t>(num_tokens);
  const auto k = static_cast<uint64_t>(config.num_experts_per_tok);
  uint64_t experts = 1;
  for (const LayerConfig& layer : config.layers) {
    experts = std::max(experts, static_cast<uint64_t>(layer.is_condensed ? layer.num_experts : 0));
  }
  const auto rows = static_cast<uint64_t>(std::min(kMomentRows, largest_tile));
  // Vectors that grow hold up to twice what they need.
  return 8 * tokens * (1 + 2 * std::max(k, experts)) +
         rows * sizeof(float) * static_cast<uint64_t>(3 * config.hidden_size);
}

}  // namespace winnow
