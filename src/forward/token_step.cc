#include "forward/token_step.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "forward/attention.h"  // NormAndRotateToken
#include "forward/expert_skipping.h"
#include "forward/router.h"
#include "kernels/attend.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

// Rows in the forms that these weights need.
void Prepare(VectorRows& rows, std::span<const WeightMatrix* const> weights, const float* x,
             int64_t count, int64_t k) {
  bool plain = false, packed = false;
  for (const WeightMatrix* w : weights) {
    if (w->empty()) continue;
    (w->packed.empty() ? plain : packed) = true;
  }
  rows.Clear();
  if (plain) rows.Plain(x, count, k, k);
  if (packed) rows.Packed(x, count, k, k);
}

}  // namespace

TokenStep::TokenStep(const ModelConfig& config, ThreadPool& pool)
    : config_(config),
      pool_(pool),
      rope_(config.rope, config.head_dim),
      scores_(static_cast<size_t>(pool.num_threads())) {}

void TokenStep::RunAttention(const LayerWeights& weights, std::span<const TokenRow> rows,
                             float* hidden) {
  const int64_t h = config_.hidden_size, qw = config_.query_width(), kvw = config_.kv_width();
  const int64_t hd = config_.head_dim, heads = config_.num_kv_heads;
  const int64_t group = config_.num_heads / heads;
  const auto n = static_cast<int64_t>(rows.size());
  for (const TokenRow& row : rows) rope_.Extend(row.position + 1);
  Grow(normed_, n * h);
  Grow(q_, n * qw);
  Grow(k_, n * kvw);
  Grow(v_, n * kvw);
  Grow(attended_, n * qw);
  Grow(projected_, n * h);
  RmsNorm(hidden, n, h, h, weights.input_norm.data(), config_.rms_norm_eps, normed_.data(), h);
  Prepare(x_, std::array{&weights.q, &weights.k, &weights.v}, normed_.data(), n, h);
  const MatVecJob projections[] = {{&x_, &weights.q, q_.data(), qw},
                                   {&x_, &weights.k, k_.data(), kvw},
                                   {&x_, &weights.v, v_.data(), kvw}};
  MatVec(projections, pool_);
  for (int64_t i = 0; i < n; ++i) {
    float* q = q_.data() + i * qw;
    float* k = k_.data() + i * kvw;
    float* v = v_.data() + i * kvw;
    if (!weights.q_bias.empty()) {
      AddInPlace(q, weights.q_bias.data(), qw);
      AddInPlace(k, weights.k_bias.data(), kvw);
      AddInPlace(v, weights.v_bias.data(), kvw);
    }
    NormAndRotateToken(config_, weights, rope_, rows[static_cast<size_t>(i)].position, q, k, v);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
  pool_.Run(n * heads, [&](int64_t task, int worker) {
    const int64_t i = task / heads, head = task % heads;
    const TokenRow& row = rows[static_cast<size_t>(i)];
    float* keys = row.cache->keys.data() + head * row.capacity * hd;
    float* values = row.cache->values.data() + head * row.capacity * hd;
    const auto bytes = static_cast<size_t>(hd) * sizeof(float);
    std::memcpy(keys + row.position * hd, k_.data() + i * kvw + head * hd, bytes);
    std::memcpy(values + row.position * hd, v_.data() + i * kvw + head * hd, bytes);
    const int64_t oldest = config_.attention_window > 0
                               ? std::max<int64_t>(0, row.position + 1 - config_.attention_window)
                               : 0;
    const int64_t num_keys = row.position + 1 - oldest;
    AlignedBuffer<float>& scores = scores_[static_cast<size_t>(worker)];
    Grow(scores, std::max(num_keys, row.capacity));
    AttendOne(q_.data() + i * qw + head * group * hd, group, keys + oldest * hd,
              values + oldest * hd, num_keys, hd, scale, scores.data(),
              attended_.data() + i * qw + head * group * hd);
  });
  x_.For(weights.o, attended_.data(), n, qw, qw);
  const MatVecJob output = {&x_, &weights.o, projected_.data(), h};
  MatVec(std::span(&output, 1), pool_);
  for (int64_t i = 0; i < n; ++i) {
    float* row = projected_.data() + i * h;
    if (!weights.o_bias.empty()) AddInPlace(row, weights.o_bias.data(), h);
    AddInPlace(hidden + i * h, row, h);
  }
}

TokenStep::Part& TokenStep::AddPart(const FeedForwardWeights& weights) {
  if (num_parts_ == parts_.size()) parts_.emplace_back();
  Part& part = parts_[num_parts_++];
  part.weights = &weights;
  part.rows.clear();
  part.scales.clear();
  return part;
}

void TokenStep::Route(const LayerWeights& weights, int64_t rows, double beta) {
  const int64_t num_experts = weights.num_experts(), k = config_.num_experts_per_tok;
  Grow(logits_, rows * num_experts);
  const MatVecJob router = {&x_, &weights.router, logits_.data(), num_experts};
  MatVec(std::span(&router, 1), pool_);
  ids_.resize(static_cast<size_t>(rows * k));
  weights_.resize(ids_.size());
  dropped_weight_.resize(static_cast<size_t>(rows));
  SelectExperts(config_, logits_.data(), rows, num_experts, ids_.data(), weights_.data(), beta,
                dropped_weight_.data());
  // Experts in ascending order, as FeedForwardBlock sums them.
  std::vector<int32_t> order(ids_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return ids_[static_cast<size_t>(a)] < ids_[static_cast<size_t>(b)];
  });
  int32_t expert = -1;
  for (const int32_t slot : order) {
    const int32_t id = ids_[static_cast<size_t>(slot)];
    if (IsSkipped(id)) continue;
    if (id != expert) AddPart(weights.experts[static_cast<size_t>(id)]);
    expert = id;
    Part& part = parts_[num_parts_ - 1];
    part.rows.push_back(slot / static_cast<int32_t>(k));
    part.scales.push_back(weights_[static_cast<size_t>(slot)]);
  }
}

void TokenStep::RunParts(int64_t rows) {
  const int64_t h = config_.hidden_size;
  const auto count = static_cast<int64_t>(num_parts_);
  const auto rows_of = [&](const Part& part) {
    return part.rows.empty() ? rows : static_cast<int64_t>(part.rows.size());
  };
  // One row is in every part and prepared already; more are gathered.
  if (rows > 1) {
    pool_.Run(count, [&](int64_t at, int) {
      Part& part = parts_[static_cast<size_t>(at)];
      if (part.rows.empty()) return;
      Grow(part.input, rows_of(part) * h);
      for (size_t i = 0; i < part.rows.size(); ++i) {
        std::memcpy(part.input.data() + static_cast<int64_t>(i) * h,
                    normed_.data() + part.rows[i] * h, static_cast<size_t>(h) * sizeof(float));
      }
      Prepare(part.x, std::array{&part.weights->gate, &part.weights->up}, part.input.data(),
              rows_of(part), h);
    });
  }
  std::vector<MatVecJob> jobs;
  for (int64_t at = 0; at < count; ++at) {
    Part& part = parts_[static_cast<size_t>(at)];
    const int64_t n = rows_of(part), width = part.weights->width();
    Grow(part.inner, 3 * n * width);
    Grow(part.output, n * h);
    const VectorRows* x = rows > 1 && !part.rows.empty() ? &part.x : &x_;
    jobs.push_back({x, &part.weights->gate, part.inner.data(), width});
    jobs.push_back({x, &part.weights->up, part.inner.data() + n * width, width});
  }
  MatVec(jobs, pool_);
  pool_.Run(count, [&](int64_t at, int) {
    Part& part = parts_[static_cast<size_t>(at)];
    const int64_t n = rows_of(part), width = part.weights->width();
    float* product = part.inner.data() + 2 * n * width;
    SwiGlu(part.inner.data(), part.inner.data() + n * width, n * width, product);
    part.inner_x.For(part.weights->down, product, n, width, width);
  });
  jobs.clear();
  for (int64_t at = 0; at < count; ++at) {
    Part& part = parts_[static_cast<size_t>(at)];
    jobs.push_back({&part.inner_x, &part.weights->down, part.output.data(), h});
  }
  MatVec(jobs, pool_);
  std::memset(sum_.data(), 0, static_cast<size_t>(rows * h) * sizeof(float));
  for (int64_t at = 0; at < count; ++at) {
    const Part& part = parts_[static_cast<size_t>(at)];
    for (int64_t i = 0; i < rows_of(part); ++i) {
      const int64_t row = part.rows.empty() ? i : part.rows[static_cast<size_t>(i)];
      const float scale = part.scales.empty() ? 1.0f : part.scales[static_cast<size_t>(i)];
      AddScaled(sum_.data() + row * h, scale, part.output.data() + i * h, h);
    }
  }
}

void TokenStep::RunFeedForward(const LayerWeights& weights, int64_t rows, double beta,
                               float* hidden) {
  const int64_t h = config_.hidden_size;
  Grow(normed_, rows * h);
  Grow(sum_, rows * h);
  RmsNorm(hidden, rows, h, h, weights.post_attention_norm.data(), config_.rms_norm_eps,
          normed_.data(), h);
  std::vector<const WeightMatrix*> readers = {&weights.router,      &weights.shared_router,
                                              &weights.shared.gate, &weights.shared.up,
                                              &weights.dense.gate,  &weights.dense.up};
  for (const FeedForwardWeights& expert : weights.experts) {  // their formats may differ
    readers.push_back(&expert.gate);
    readers.push_back(&expert.up);
  }
  Prepare(x_, readers, normed_.data(), rows, h);
  num_parts_ = 0;
  if (!weights.router.empty()) {
    Route(weights, rows, beta);
  } else if (!weights.dense.gate.empty()) {
    AddPart(weights.dense);
  }
  if (!weights.shared.gate.empty()) {
    Part& shared = AddPart(weights.shared);
    if (!weights.shared_router.empty()) {
      Grow(shared_gate_, rows);
      const MatVecJob gate = {&x_, &weights.shared_router, shared_gate_.data(), 1};
      MatVec(std::span(&gate, 1), pool_);
      for (int64_t i = 0; i < rows; ++i) {
        shared.scales.push_back(1.0f / (1.0f + std::exp(-shared_gate_[static_cast<size_t>(i)])));
      }
    }
  }
  if (weights.router.empty()) {
    for (size_t e = 0; e < weights.experts.size(); ++e) {
      AddPart(weights.experts[e])
          .scales.assign(static_cast<size_t>(rows), weights.expert_alphas[e]);
    }
  }
  RunParts(rows);
  AddInPlace(hidden, sum_.data(), rows * h);
}

uint64_t TokenStep::ScratchBytes(const ModelConfig& config, int64_t rows, int64_t capacity,
                                 int num_threads) {
  const int64_t h = config.hidden_size, qw = config.query_width(), kvw = config.kv_width();
  int64_t largest = 0;
  for (const LayerConfig& layer : config.layers) {
    const auto part = [&](int64_t width, int64_t n) { return n * (4 * h + 6 * width); };
    const int64_t routed = rows * config.num_experts_per_tok;
    largest = std::max(largest,
                       part(layer.expert_width, layer.is_moe ? routed : rows * layer.num_experts) +
                           part(layer.shared_width, rows) + part(layer.dense_width, rows));
  }
  const int64_t floats =
      rows * (6 * h + 3 * qw + 2 * kvw) + largest + capacity * (num_threads + config.head_dim);
  return static_cast<uint64_t>(floats) * sizeof(float);
}

}  // namespace winnow
