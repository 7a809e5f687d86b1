#include "train/feed_forward_gradient.h"

#include <cmath>
#include <cstring>

#include "forward/router.h"
#include "kernels/backward.h"
#include "kernels/elementwise.h"

namespace winnow {

const FeedForwardWeights& WeightsOfPart(const LayerWeights& weights, const FeedForwardPart& part) {
  switch (part.kind) {
    case PartKind::kDense:
      return weights.dense;
    case PartKind::kShared:
      return weights.shared;
    case PartKind::kExpert:
      break;
  }
  return weights.experts[static_cast<size_t>(part.expert)];
}

FeedForwardGradient::FeedForwardGradient(const ModelConfig& config, ThreadPool& pool,
                                         ComputePrecision precision)
    : config_(config), pool_(pool), precision_(precision), products_(pool) {}

void FeedForwardGradient::ListParts(const LayerWeights& weights, int64_t n,
                                    FeedForwardTape& tape) const {
  tape.parts.clear();
  const auto add_whole = [&](PartKind kind, const FeedForwardWeights& part, int32_t expert) {
    if (part.gate.empty()) return;
    FeedForwardPart whole;
    whole.kind = kind;
    whole.expert = expert;
    whole.rows = n;
    whole.width = part.width();
    tape.parts.push_back(std::move(whole));
  };
  add_whole(PartKind::kDense, weights.dense, 0);
  add_whole(PartKind::kShared, weights.shared, 0);
  const int64_t k = config_.num_experts_per_tok;
  const size_t first_expert = tape.parts.size();
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    add_whole(PartKind::kExpert, weights.experts[e], static_cast<int32_t>(e));
  }
  if (!weights.router.empty()) {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < k; ++i) {
        const auto e = static_cast<size_t>(tape.ids[static_cast<size_t>(t * k + i)]);
        FeedForwardPart& part = tape.parts[first_expert + e];
        part.tokens.push_back(static_cast<int32_t>(t));
        part.slots.push_back(t * k + i);
      }
    }
    for (size_t p = first_expert; p < tape.parts.size(); ++p) {
      tape.parts[p].rows = static_cast<int64_t>(tape.parts[p].tokens.size());
    }
  }
  int64_t offset = 0;
  for (FeedForwardPart& part : tape.parts) {
    part.offset = offset;
    offset += part.rows * part.width;
  }
  GrowBuffer(tape.gate, offset);
  GrowBuffer(tape.up, offset);
}

void FeedForwardGradient::Route(const LayerWeights& weights, int64_t n, FeedForwardTape& tape) {
  const int64_t num_experts = weights.num_experts(), k = config_.num_experts_per_tok;
  GrowBuffer(logits_, n * num_experts);
  GrowBuffer(tape.probabilities, n * num_experts);
  GrowBuffer(tape.ids, n * k);
  GrowBuffer(tape.routing, n * k);
  MatMul(packed_, weights.router, logits_.data(), num_experts, pool_);
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    float* probabilities = tape.probabilities.data() + first * num_experts;
    std::copy_n(logits_.data() + first * num_experts, (end - first) * num_experts, probabilities);
    Softmax(probabilities, end - first, num_experts, num_experts);
    SelectExperts(config_, logits_.data() + first * num_experts, end - first, num_experts,
                  tape.ids.data() + first * k, tape.routing.data() + first * k);
  });
}

float FeedForwardGradient::ScaleOf(const LayerWeights& weights, const FeedForwardTape& tape,
                                   const FeedForwardPart& part, int64_t row) const {
  if (part.kind == PartKind::kDense) return 1;
  if (part.kind == PartKind::kShared) {
    return weights.shared_router.empty() ? 1 : tape.shared_gate[static_cast<size_t>(row)];
  }
  if (weights.router.empty()) return weights.expert_alphas[static_cast<size_t>(part.expert)];
  return tape.routing[static_cast<size_t>(part.slots[static_cast<size_t>(row)])];
}

void FeedForwardGradient::Forward(const LayerWeights& weights, int64_t n, const float* middle,
                                  float* stream, FeedForwardTape& tape) {
  const int64_t h = config_.hidden_size;
  GrowBuffer(tape.normed, n * h);
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    RmsNorm(middle + first * h, end - first, h, h, weights.post_attention_norm.data(),
            config_.rms_norm_eps, tape.normed.data() + first * h, h);
  });
  packed_.Pack(tape.normed.data(), n, h, h, pool_);
  if (!weights.router.empty()) Route(weights, n, tape);
  if (!weights.shared_router.empty()) {
    GrowBuffer(tape.shared_gate, n);
    MatMul(packed_, weights.shared_router, tape.shared_gate.data(), 1, pool_);
    for (int64_t t = 0; t < n; ++t) {
      float& gate = tape.shared_gate[static_cast<size_t>(t)];
      gate = 1.0f / (1.0f + std::exp(-gate));
    }
  }
  ListParts(weights, n, tape);
  GrowBuffer(rows_, n * h);
  for (const FeedForwardPart& part : tape.parts) {
    if (part.rows == 0) continue;
    const FeedForwardWeights& w = WeightsOfPart(weights, part);
    const PackedRows* x = &packed_;
    if (!part.tokens.empty()) {
      packed_rows_.PackGathered(tape.normed.data(), part.tokens, h, h, pool_);
      x = &packed_rows_;
    }
    float* gate = tape.gate.data() + part.offset;
    float* up = tape.up.data() + part.offset;
    MatMul(*x, w.gate, gate, part.width, pool_, precision_);
    MatMul(*x, w.up, up, part.width, pool_, precision_);
    if (stream == nullptr) continue;
    packed_inner_.PackSwiGlu(gate, up, part.rows, part.width, part.width, pool_);
    MatMul(packed_inner_, w.down, rows_.data(), h, pool_, precision_);
    ForRowRanges(pool_, part.rows, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t token = part.tokens.empty() ? i : part.tokens[static_cast<size_t>(i)];
        AddScaled(stream + token * h, ScaleOf(weights, tape, part, i), rows_.data() + i * h, h);
      }
    });
  }
}

void FeedForwardGradient::PartBackward(const LayerWeights& weights, const FeedForwardTape& tape,
                                       const FeedForwardPart& part, const float* d_out, int64_t n,
                                       const FeedForwardSlots& slots, bool needs_normed) {
  const int64_t h = config_.hidden_size, rows = part.rows, width = part.width;
  const FeedForwardWeights& w = WeightsOfPart(weights, part);
  const bool routed = !part.tokens.empty();
  const float* d_rows = d_out;
  if (routed) {
    GrowBuffer(d_out_, n * h);
    ForRowRanges(pool_, rows, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        std::copy_n(d_out + part.tokens[static_cast<size_t>(i)] * h, h, d_out_.data() + i * h);
      }
    });
    d_rows = d_out_.data();
  }
  GrowBuffer(d_inner_, rows * width);
  GrowBuffer(d_gate_, rows * width);
  GrowBuffer(d_up_, rows * width);
  GrowBuffer(inner_, rows * width);
  products_.Input(d_rows, rows, w.down, d_inner_.data());
  ForRowRanges(pool_, rows, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t at = i * width, from = part.offset + at;
      const float d_scale =
          SwiGluBackward(tape.gate.data() + from, tape.up.data() + from, d_inner_.data() + at,
                         ScaleOf(weights, tape, part, i), width, d_gate_.data() + at,
                         d_up_.data() + at, inner_.data() + at);
      if (part.kind == PartKind::kShared && !weights.shared_router.empty()) {
        d_shared_gate_[static_cast<size_t>(i)] = d_scale;
      } else if (routed) {
        d_routing_[static_cast<size_t>(part.slots[static_cast<size_t>(i)])] = d_scale;
      }
    }
  });
  if (slots.down != nullptr) {
    products_.Weight(d_rows, rows, h, inner_.data(), width, slots.down);
  }
  if (slots.gate != nullptr || slots.up != nullptr) {
    const float* x = tape.normed.data();
    if (routed) {
      GrowBuffer(gathered_, n * h);
      ForRowRanges(pool_, rows, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) {
          std::copy_n(x + part.tokens[static_cast<size_t>(i)] * h, h, gathered_.data() + i * h);
        }
      });
      x = gathered_.data();
    }
    if (slots.gate != nullptr) {
      products_.Weight(d_gate_.data(), rows, width, x, h, slots.gate);
    }
    if (slots.up != nullptr) products_.Weight(d_up_.data(), rows, width, x, h, slots.up);
  }
  if (!needs_normed) return;
  GrowBuffer(rows_, n * h);
  for (const auto& [gradient, matrix] : {std::pair{&d_gate_, &w.gate}, {&d_up_, &w.up}}) {
    products_.Input(gradient->data(), rows, *matrix, rows_.data());
    ForRowRanges(pool_, rows, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t token = routed ? part.tokens[static_cast<size_t>(i)] : i;
        AddInPlace(d_normed_.data() + token * h, rows_.data() + i * h, h);
      }
    });
  }
}

// d_routing_ holds the gradients of the weights the router returned.
void FeedForwardGradient::RouterBackward(const LayerWeights& weights, const TrainBatch& batch,
                                         const FeedForwardTape& tape, const BalanceLoss& balance,
                                         const GradientSlots& slots, bool needs_normed) {
  const int64_t n = batch.num_tokens(), num_experts = weights.num_experts();
  const int64_t k = config_.num_experts_per_tok, h = config_.hidden_size;
  GrowBuffer(d_logits_, n * num_experts);
  std::fill_n(d_logits_.data(), n * num_experts, 0.0f);
  if (balance.alpha != 0) {
    // Tokens over which selections are counted: one row, or everything.
    std::vector<int64_t> spans = batch.lengths;
    if (!balance.by_row) spans = {n};
    int64_t first = 0;
    for (const int64_t length : spans) {
      std::vector<double> counts(static_cast<size_t>(num_experts));
      for (int64_t i = first * k; i < (first + length) * k; ++i) {
        counts[static_cast<size_t>(tape.ids[static_cast<size_t>(i)])] += 1;
      }
      // Per token: mean over the tokens of a row and over rows, or over all tokens.
      const double share =
          balance.by_row ? 1.0 / static_cast<double>(balance.rows) / static_cast<double>(length)
                         : 1.0 / static_cast<double>(balance.tokens);
      const double even = static_cast<double>(length * k) / static_cast<double>(num_experts);
      for (int64_t t = first; t < first + length; ++t) {
        for (int64_t e = 0; e < num_experts; ++e) {
          d_logits_[static_cast<size_t>(t * num_experts + e)] =
              static_cast<float>(balance.alpha * share * counts[static_cast<size_t>(e)] / even);
        }
      }
      first += length;
    }
  }
  ForRowRanges(pool_, n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* d_p = d_logits_.data() + t * num_experts;
      const float* p = tape.probabilities.data() + t * num_experts;
      double sum = 1, pulled = 0;
      if (config_.norm_topk_prob) {
        sum = config_.normalize_epsilon;
        for (int64_t i = 0; i < k; ++i) {
          const auto at = static_cast<size_t>(t * k + i);
          sum += static_cast<double>(p[tape.ids[at]]);
          pulled += static_cast<double>(d_routing_[at]) * static_cast<double>(tape.routing[at]);
        }
      }
      for (int64_t i = 0; i < k; ++i) {
        const auto at = static_cast<size_t>(t * k + i);
        d_p[tape.ids[at]] +=
            static_cast<float>((static_cast<double>(d_routing_[at]) - pulled) / sum);
      }
      SoftmaxBackward(p, 1, num_experts, d_p);
    }
  });
  if (slots.router != nullptr) {
    products_.Weight(d_logits_.data(), n, num_experts, tape.normed.data(), h, slots.router);
  }
  if (!needs_normed) return;
  products_.Input(d_logits_.data(), n, weights.router, rows_.data());
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    AddInPlace(d_normed_.data() + first * h, rows_.data() + first * h, (end - first) * h);
  });
}

void FeedForwardGradient::SharedGateBackward(const LayerWeights& weights,
                                             const FeedForwardTape& tape, int64_t n,
                                             const GradientSlots& slots, bool needs_normed) {
  const int64_t h = config_.hidden_size;
  for (int64_t t = 0; t < n; ++t) {
    const float gate = tape.shared_gate[static_cast<size_t>(t)];
    d_shared_gate_[static_cast<size_t>(t)] *= gate * (1 - gate);
  }
  if (slots.shared_router != nullptr) {
    products_.Weight(d_shared_gate_.data(), n, 1, tape.normed.data(), h, slots.shared_router);
  }
  if (!needs_normed) return;
  std::vector<float> row(static_cast<size_t>(h));
  WidenRow(weights.shared_router, 0, row.data());
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      AddScaled(d_normed_.data() + t * h, d_shared_gate_[static_cast<size_t>(t)], row.data(), h);
    }
  });
}

void FeedForwardGradient::Backward(const LayerWeights& weights, const TrainBatch& batch,
                                   const float* stream, const FeedForwardTape& tape,
                                   const BalanceLoss& balance, float* d_stream,
                                   const GradientSlots& slots, bool needs_input) {
  const int64_t h = config_.hidden_size, n = batch.num_tokens();
  const bool needs_normed = needs_input || slots.post_attention_norm != nullptr;
  const bool gated = !weights.shared_router.empty();
  const bool routed = !weights.router.empty();
  GrowBuffer(rows_, n * h);
  if (needs_normed) {
    GrowBuffer(d_normed_, n * h);
    std::fill_n(d_normed_.data(), n * h, 0.0f);
  }
  if (routed) GrowBuffer(d_routing_, n * config_.num_experts_per_tok);
  if (gated) GrowBuffer(d_shared_gate_, n);
  for (const FeedForwardPart& part : tape.parts) {
    if (part.rows == 0) continue;
    FeedForwardSlots own = part.kind == PartKind::kDense ? slots.dense : slots.shared;
    if (part.kind == PartKind::kExpert) {
      const auto at = static_cast<size_t>(part.expert);
      own = at < slots.experts.size() ? slots.experts[at] : FeedForwardSlots{};
    }
    const bool scale_matters =
        (part.kind == PartKind::kExpert && routed && slots.router != nullptr) ||
        (part.kind == PartKind::kShared && gated && slots.shared_router != nullptr);
    if (!needs_normed && !own.any() && !scale_matters) continue;
    PartBackward(weights, tape, part, d_stream, n, own, needs_normed);
  }
  if (routed && (needs_normed || slots.router != nullptr)) {
    RouterBackward(weights, batch, tape, balance, slots, needs_normed);
  }
  if (gated && (needs_normed || slots.shared_router != nullptr)) {
    SharedGateBackward(weights, tape, n, slots, needs_normed);
  }
  if (!needs_normed) return;
  products_.Norm(stream, n, 1, h, weights.post_attention_norm, config_.rms_norm_eps,
                 d_normed_.data(), d_stream, slots.post_attention_norm);
}

uint64_t FeedForwardGradient::TapeBytes(const ModelConfig& config, const LayerConfig& layer,
                                        int64_t tokens) {
  const int64_t k = config.num_experts_per_tok;
  const int64_t used = layer.is_moe ? k : layer.num_experts;
  const int64_t inner = used * layer.expert_width + layer.shared_width + layer.dense_width;
  const int64_t floats =
      config.hidden_size + 2 * inner + (layer.is_moe ? layer.num_experts + 4 * k : 0) + 1;
  return static_cast<uint64_t>(tokens) * static_cast<uint64_t>(floats) * sizeof(float);
}

uint64_t FeedForwardGradient::ScratchBytes(const ModelConfig& config, int64_t tokens) {
  int64_t width = 0, experts = 0, largest = 0;
  for (const LayerConfig& layer : config.layers) {
    width = std::max({width, layer.expert_width, layer.shared_width, layer.dense_width});
    experts = std::max(experts, layer.num_experts);
  }
  largest = width * config.hidden_size;  // a product before it is added to a gradient
  const int64_t floats =
      tokens * (5 * config.hidden_size + 4 * width + 2 * experts + config.num_experts_per_tok + 1) +
      largest;
  return static_cast<uint64_t>(floats) * sizeof(float) +
         3 * PackedRows::Bytes(tokens, std::max(width, config.hidden_size)) +
         PackedRows::Bytes(std::max(width, config.hidden_size), tokens);
}

}  // namespace winnow
