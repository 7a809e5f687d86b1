#include "forward/feed_forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "forward/router.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

// Rows of one expert or MLP computed at once; its gate and up outputs then stay in cache.
constexpr int64_t kMlpRows = 512;
constexpr int64_t kRoutedChunk = 4096;
constexpr uint64_t kAllExpertsBytes = uint64_t{64} << 20;

// Calls body(first, end) for row ranges in parallel.
template <class Body>
void ForRows(ThreadPool& pool, int64_t n, const Body& body) {
  constexpr int64_t kRows = 64;
  pool.Run((n + kRows - 1) / kRows,
           [&](int64_t task, int) { body(task * kRows, std::min(n, (task + 1) * kRows)); });
}

}  // namespace

FeedForwardBlock::FeedForwardBlock(const ModelConfig& config, ThreadPool& pool,
                                   ComputePrecision precision)
    : config_(config), pool_(pool), precision_(precision) {}

void FeedForwardBlock::SetSkipping(const SkipBetas& betas) {
  betas_ = betas;
  betas_.resize(config_.layers.size());
  skip_counts_ = SkipCounts(config_.layers.size());
}

int64_t FeedForwardBlock::ChunkTokens(const ModelConfig& config, const LayerConfig& layer,
                                      bool all_experts) {
  if (!all_experts || !layer.is_moe) return kRoutedChunk;
  const uint64_t per_token = static_cast<uint64_t>(layer.num_experts) *
                             static_cast<uint64_t>(config.hidden_size) * sizeof(float);
  const auto fitting = static_cast<int64_t>(kAllExpertsBytes / per_token);
  // Fewer than 256 rows a product would spend too much on widening the weights.
  return std::clamp<int64_t>(fitting, 256, kRoutedChunk);
}

uint64_t FeedForwardBlock::ScratchBytes(const ModelConfig& config, bool all_experts) {
  uint64_t largest = 0;
  for (const LayerConfig& layer : config.layers) {
    const auto chunk = static_cast<uint64_t>(ChunkTokens(config, layer, all_experts));
    const auto h = static_cast<uint64_t>(config.hidden_size);
    const auto width = static_cast<uint64_t>(
        std::max({layer.expert_width, layer.shared_width, layer.dense_width}));
    uint64_t floats = chunk * h * 4 + chunk * static_cast<uint64_t>(layer.num_experts);
    floats += kMlpRows * (2 * width + h);
    if (layer.is_moe) {
      const auto k = static_cast<uint64_t>(config.num_experts_per_tok);
      floats += chunk * k * 4;
      if (all_experts) floats += chunk * static_cast<uint64_t>(layer.num_experts) * h;
    }
    const auto rows = static_cast<int64_t>(chunk);
    const uint64_t packs = PackedRows::Bytes(rows, config.hidden_size) +
                           PackedRows::Bytes(kMlpRows, config.hidden_size) +
                           PackedRows::Bytes(kMlpRows, static_cast<int64_t>(width));
    largest = std::max(largest, floats * sizeof(float) + packs);
  }
  return largest;
}

void FeedForwardBlock::Run(const LayerWeights& weights, const FeedForwardCall& call, int64_t n,
                           float* hidden) {
  LayerConfig layer;
  layer.is_moe = !weights.router.empty();
  layer.num_experts = weights.num_experts();
  const bool all = call.observer != nullptr && call.observer->WantsExpertOutputs();
  const int64_t chunk = ChunkTokens(config_, layer, all);
  for (int64_t first = 0; first < n; first += chunk) {
    FeedForwardCall part = call;
    part.first_token += first;
    RunChunk(weights, part, std::min(chunk, n - first), hidden + first * config_.hidden_size);
  }
}

void FeedForwardBlock::RunChunk(const LayerWeights& weights, const FeedForwardCall& call, int64_t n,
                                float* hidden) {
  const int64_t h = config_.hidden_size;
  Grow(normed_, n * h);
  ForRows(pool_, n, [&](int64_t first, int64_t end) {
    RmsNorm(hidden + first * h, end - first, h, h, weights.post_attention_norm.data(),
            config_.rms_norm_eps, normed_.data() + first * h, h);
  });
  Grow(output_, n * h);
  if (weights.router.empty()) {
    RunUnrouted(weights, call, n);
    if (call.observer != nullptr && call.observer->WantsExpertRows()) {
      call.observer->OnTokens({.layer = call.layer,
                               .first_token = call.first_token,
                               .num_tokens = n,
                               .hidden = h,
                               .residual = hidden,
                               .input = normed_.data(),
                               .output = output_.data()});
    }
  } else {
    const int64_t num_experts = weights.num_experts(), k = config_.num_experts_per_tok;
    Grow(logits_, n * num_experts);
    Grow(ids_, n * k);
    Grow(weights_, n * k);
    Grow(routed_, n * h);
    packed_input_.Pack(normed_.data(), n, h, h, pool_);
    MatMul(packed_input_, weights.router, logits_.data(), num_experts, pool_);
    Grow(dropped_weight_, n);
    const double beta = betas_.empty() ? 0.0 : betas_[static_cast<size_t>(call.layer)];
    ForRows(pool_, n, [&](int64_t first, int64_t end) {
      SelectExperts(config_, logits_.data() + first * num_experts, end - first, num_experts,
                    ids_.data() + first * k, weights_.data() + first * k, beta,
                    dropped_weight_.data() + first);
    });
    if (!betas_.empty()) {
      skip_counts_.Count(call.layer, n, k, ids_.data(), dropped_weight_.data());
    }
    const bool all = call.observer != nullptr && call.observer->WantsExpertOutputs();
    const bool selected = call.observer != nullptr && call.observer->WantsSelectedOutputs();
    if (selected && !all) Grow(selected_, n * k * h);
    if (call.add_to_residual || call.observer != nullptr) {
      if (all) {
        RouteAllExperts(weights, n);
      } else {
        RouteGathered(weights, call, n, selected);
      }
      std::memcpy(output_.data(), routed_.data(), static_cast<size_t>(n * h) * sizeof(float));
      if (!weights.shared.gate.empty()) AddShared(weights, call, n);
    }
    if (call.observer != nullptr) {
      call.observer->OnTokens({.layer = call.layer,
                               .first_token = call.first_token,
                               .num_tokens = n,
                               .hidden = h,
                               .num_experts = num_experts,
                               .num_experts_per_tok = k,
                               .residual = hidden,
                               .input = normed_.data(),
                               .router_logits = logits_.data(),
                               .topk_ids = ids_.data(),
                               .topk_weights = weights_.data(),
                               .routed = routed_.data(),
                               .output = output_.data(),
                               .expert_outputs = all ? expert_outputs_.data() : nullptr,
                               .selected_outputs = selected && !all ? selected_.data() : nullptr});
    }
  }
  if (!call.add_to_residual) return;
  ForRows(pool_, n, [&](int64_t first, int64_t end) {
    AddInPlace(hidden + first * h, output_.data() + first * h, (end - first) * h);
  });
}

void FeedForwardBlock::SwiGluMlp(const FeedForwardWeights& weights, const PackedRows& x, float* y,
                                 int64_t ld) {
  const int64_t rows = x.rows(), width = weights.width();
  Grow(gate_, rows * width);
  Grow(up_, rows * width);
  MatMul(x, weights.gate, gate_.data(), width, pool_, precision_);
  MatMul(x, weights.up, up_.data(), width, pool_, precision_);
  packed_inner_.PackSwiGlu(gate_.data(), up_.data(), rows, width, width, pool_);
  MatMul(packed_inner_, weights.down, y, ld, pool_, precision_);
}

void FeedForwardBlock::RunExpert(const FeedForwardWeights& expert, const float* x, int64_t n,
                                 float* y) {
  const int64_t h = config_.hidden_size;
  for (int64_t first = 0; first < n; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, n - first);
    packed_rows_.Pack(x + first * h, rows, h, h, pool_);
    SwiGluMlp(expert, packed_rows_, y + first * h, h);
  }
}

void FeedForwardBlock::RunInner(const FeedForwardWeights& expert, const float* x, int64_t n,
                                float* inner, int64_t ld) {
  const int64_t h = config_.hidden_size, width = expert.width();
  Grow(gate_, kMlpRows * width);
  Grow(up_, kMlpRows * width);
  for (int64_t first = 0; first < n; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, n - first);
    packed_rows_.Pack(x + first * h, rows, h, h, pool_);
    MatMul(packed_rows_, expert.gate, gate_.data(), width, pool_, precision_);
    MatMul(packed_rows_, expert.up, up_.data(), width, pool_, precision_);
    ForRows(pool_, rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        SwiGlu(gate_.data() + i * width, up_.data() + i * width, width, inner + (first + i) * ld);
      }
    });
  }
}

template <class TokenOf, class WeightOf>
void FeedForwardBlock::ShowRows(const FeedForwardCall& call, int32_t expert, int64_t rows,
                                int64_t width, const TokenOf& token_of, const WeightOf& weight_of) {
  if (call.observer == nullptr || !call.observer->WantsExpertRows()) return;
  ExpertRows shown{.layer = call.layer,
                   .expert = expert,
                   .num_rows = rows,
                   .width = width,
                   .gate = gate_.data(),
                   .up = up_.data()};
  for (int64_t i = 0; i < rows; ++i) {
    shown.tokens.push_back(call.first_token + token_of(i));
    shown.weights.push_back(weight_of(i));
  }
  call.observer->OnExpertRows(shown);
}

void FeedForwardBlock::RouteGathered(const LayerWeights& weights, const FeedForwardCall& call,
                                     int64_t n, bool keep_outputs) {
  const int64_t h = config_.hidden_size, k = config_.num_experts_per_tok;
  const auto num_experts = static_cast<size_t>(weights.num_experts());
  tokens_of_expert_.resize(num_experts);
  slots_of_expert_.resize(num_experts);
  for (size_t e = 0; e < num_experts; ++e) {
    tokens_of_expert_[e].clear();
    slots_of_expert_[e].clear();
  }
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      if (IsSkipped(ids_[static_cast<size_t>(t * k + i)])) continue;
      const auto e = static_cast<size_t>(ids_[static_cast<size_t>(t * k + i)]);
      tokens_of_expert_[e].push_back(static_cast<int32_t>(t));
      slots_of_expert_[e].push_back(t * k + i);
    }
  }
  std::memset(routed_.data(), 0, static_cast<size_t>(n * h) * sizeof(float));
  Grow(rows_, kMlpRows * h);
  for (size_t e = 0; e < num_experts; ++e) {
    const auto count = static_cast<int64_t>(tokens_of_expert_[e].size());
    for (int64_t first = 0; first < count; first += kMlpRows) {
      const int64_t rows = std::min(kMlpRows, count - first);
      const int32_t* tokens = tokens_of_expert_[e].data() + first;
      const int64_t* slots = slots_of_expert_[e].data() + first;
      packed_rows_.PackGathered(normed_.data(), std::span(tokens, static_cast<size_t>(rows)), h, h,
                                pool_);
      SwiGluMlp(weights.experts[e], packed_rows_, rows_.data(), h);
      ShowRows(
          call, static_cast<int32_t>(e), rows, weights.experts[e].width(),
          [&](int64_t i) { return int64_t{tokens[i]}; },
          [&](int64_t i) { return weights_[static_cast<size_t>(slots[i])]; });
      ForRows(pool_, rows, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float* row = rows_.data() + i * h;
          AddScaled(routed_.data() + tokens[i] * h, weights_[static_cast<size_t>(slots[i])], row,
                    h);
          if (keep_outputs) {
            std::memcpy(selected_.data() + slots[i] * h, row,
                        static_cast<size_t>(h) * sizeof(float));
          }
        }
      });
    }
  }
}

void FeedForwardBlock::RouteAllExperts(const LayerWeights& weights, int64_t n) {
  const int64_t h = config_.hidden_size, k = config_.num_experts_per_tok;
  const int64_t num_experts = weights.num_experts();
  const int64_t ld = num_experts * h;
  Grow(expert_outputs_, n * ld);
  for (int64_t first = 0; first < n; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, n - first);
    packed_rows_.Pack(normed_.data() + first * h, rows, h, h, pool_);
    for (int64_t e = 0; e < num_experts; ++e) {
      SwiGluMlp(weights.experts[static_cast<size_t>(e)], packed_rows_,
                expert_outputs_.data() + first * ld + e * h, ld);
    }
  }
  std::memset(routed_.data(), 0, static_cast<size_t>(n * h) * sizeof(float));
  ForRows(pool_, n, [&](int64_t first, int64_t end) {
    std::vector<std::pair<int32_t, float>> chosen(static_cast<size_t>(k));
    for (int64_t t = first; t < end; ++t) {
      for (int64_t i = 0; i < k; ++i) {
        chosen[static_cast<size_t>(i)] = {ids_[static_cast<size_t>(t * k + i)],
                                          weights_[static_cast<size_t>(t * k + i)]};
      }
      std::sort(chosen.begin(), chosen.end());
      for (const auto& [e, w] : chosen) {
        if (IsSkipped(e)) continue;
        AddScaled(routed_.data() + t * h, w, expert_outputs_.data() + t * ld + e * h, h);
      }
    }
  });
}

void FeedForwardBlock::RunUnrouted(const LayerWeights& weights, const FeedForwardCall& call,
                                   int64_t n) {
  const int64_t h = config_.hidden_size;
  if (weights.dense.gate.empty()) {
    std::memset(output_.data(), 0, static_cast<size_t>(n * h) * sizeof(float));
  } else {
    for (int64_t first = 0; first < n; first += kMlpRows) {
      const int64_t rows = std::min(kMlpRows, n - first);
      packed_rows_.Pack(normed_.data() + first * h, rows, h, h, pool_);
      SwiGluMlp(weights.dense, packed_rows_, output_.data() + first * h, h);
      ShowRows(
          call, kDensePart, rows, weights.dense.width(), [&](int64_t i) { return first + i; },
          [](int64_t) { return 1.0f; });
    }
  }
  if (!weights.shared.gate.empty()) AddShared(weights, call, n);
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    AddUnrouted(weights.experts[e], static_cast<int32_t>(e), weights.expert_alphas[e], call, n);
  }
}

void FeedForwardBlock::AddUnrouted(const FeedForwardWeights& part, int32_t expert, float alpha,
                                   const FeedForwardCall& call, int64_t n) {
  const int64_t h = config_.hidden_size;
  Grow(rows_, kMlpRows * h);
  for (int64_t first = 0; first < n; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, n - first);
    packed_rows_.Pack(normed_.data() + first * h, rows, h, h, pool_);
    SwiGluMlp(part, packed_rows_, rows_.data(), h);
    ShowRows(
        call, expert, rows, part.width(), [&](int64_t i) { return first + i; },
        [&](int64_t) { return alpha; });
    ForRows(pool_, rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        AddScaled(output_.data() + (first + i) * h, alpha, rows_.data() + i * h, h);
      }
    });
  }
}

void FeedForwardBlock::AddShared(const LayerWeights& weights, const FeedForwardCall& call,
                                 int64_t n) {
  const int64_t h = config_.hidden_size;
  Grow(rows_, kMlpRows * h);
  Grow(shared_gate_, kMlpRows);
  for (int64_t first = 0; first < n; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, n - first);
    packed_rows_.Pack(normed_.data() + first * h, rows, h, h, pool_);
    SwiGluMlp(weights.shared, packed_rows_, rows_.data(), h);
    if (!weights.shared_router.empty()) {
      MatMul(packed_rows_, weights.shared_router, shared_gate_.data(), 1, pool_);
    }
    const auto scale = [&](int64_t i) {
      return weights.shared_router.empty()
                 ? 1.0f
                 : 1.0f / (1.0f + std::exp(-shared_gate_[static_cast<size_t>(i)]));
    };
    ShowRows(
        call, kSharedPart, rows, weights.shared.width(), [&](int64_t i) { return first + i; },
        scale);
    ForRows(pool_, rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        AddScaled(output_.data() + (first + i) * h, scale(i), rows_.data() + i * h, h);
      }
    });
  }
}

}  // namespace winnow
