#include "forward/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/elementwise.h"

namespace winnow {
namespace {

constexpr int64_t kQueryBlock = 128;  // queries scored at once against the keys they see

WeightMatrix AsMatrix(const float* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {reinterpret_cast<const std::byte*>(data), rows, cols, Dtype::kF32, row_stride};
}

}  // namespace

void NormAndRotateToken(const ModelConfig& config, const LayerWeights& weights,
                        const RopeTable& rope, int64_t position, float* q, float* k, float* v) {
  const int64_t qw = config.query_width(), kvw = config.kv_width(), hd = config.head_dim;
  const float eps = config.rms_norm_eps;
  if (config.qk_norm == QkNorm::kWholeProjection) {
    RmsNorm(q, 1, qw, qw, weights.q_norm.data(), eps, q, qw);
    RmsNorm(k, 1, kvw, kvw, weights.k_norm.data(), eps, k, kvw);
  } else if (config.qk_norm == QkNorm::kPerHead) {
    RmsNorm(q, config.num_heads, hd, hd, weights.q_norm.data(), eps, q, hd);
    RmsNorm(k, config.num_kv_heads, hd, hd, weights.k_norm.data(), eps, k, hd);
  }
  if (config.clip_qkv) {
    const float c = *config.clip_qkv;
    for (int64_t i = 0; i < qw; ++i) q[i] = std::clamp(q[i], -c, c);
    for (int64_t i = 0; i < kvw; ++i) k[i] = std::clamp(k[i], -c, c);
    for (int64_t i = 0; i < kvw; ++i) v[i] = std::clamp(v[i], -c, c);
  }
  RopeHalf(q, config.num_heads, hd, rope.half(), rope.cos(position), rope.sin(position));
  RopeHalf(k, config.num_kv_heads, hd, rope.half(), rope.cos(position), rope.sin(position));
}

struct AttentionBlock::WorkerScratch {
  AlignedBuffer<float> keys;    // [keys, head_dim]
  AlignedBuffer<float> values;  // [head_dim, keys], transposed
  AlignedBuffer<float> scores;  // [kQueryBlock, keys]
  PackedRows packed;
};

struct AttentionBlock::Head {
  const float* q = nullptr;     // first query of the sequence, head 0; rows of query_width
  float* out = nullptr;         // likewise
  const float* keys = nullptr;  // [num_keys] rows with stride ld_kv
  const float* values = nullptr;
  int64_t ld_kv = 0;
  int64_t kv_head = 0;
  int64_t num_queries = 0;
  int64_t num_keys = 0;  // the last num_queries of them are the queries' own
};

AttentionBlock::AttentionBlock(const ModelConfig& config, ThreadPool& pool,
                               ComputePrecision precision)
    : config_(config),
      pool_(pool),
      precision_(precision),
      rope_(config.rope, config.head_dim),
      workers_(static_cast<size_t>(pool.num_threads())) {}

AttentionBlock::~AttentionBlock() = default;

void AttentionBlock::Project(const LayerWeights& weights, int64_t n, const float* hidden) {
  const int64_t h = config_.hidden_size, qw = config_.query_width(), kvw = config_.kv_width();
  Grow(normed_, n * h);
  Grow(q_, n * qw);
  Grow(k_, n * kvw);
  Grow(v_, n * kvw);
  RmsNorm(hidden, n, h, h, weights.input_norm.data(), config_.rms_norm_eps, normed_.data(), h);
  packed_.Pack(normed_.data(), n, h, h, pool_);
  MatMul(packed_, weights.q, q_.data(), qw, pool_, precision_);
  MatMul(packed_, weights.k, k_.data(), kvw, pool_, precision_);
  MatMul(packed_, weights.v, v_.data(), kvw, pool_, precision_);
}

void AttentionBlock::NormAndRotate(const LayerWeights& weights, int64_t n,
                                   std::span<const int64_t> positions) {
  const int64_t qw = config_.query_width(), kvw = config_.kv_width();
  constexpr int64_t kRows = 32;
  pool_.Run((n + kRows - 1) / kRows, [&](int64_t task, int) {
    const int64_t end = std::min(n, (task + 1) * kRows);
    for (int64_t t = task * kRows; t < end; ++t) {
      float* q = q_.data() + t * qw;
      float* k = k_.data() + t * kvw;
      float* v = v_.data() + t * kvw;
      if (!weights.q_bias.empty()) {
        AddInPlace(q, weights.q_bias.data(), qw);
        AddInPlace(k, weights.k_bias.data(), kvw);
        AddInPlace(v, weights.v_bias.data(), kvw);
      }
      NormAndRotateToken(config_, weights, rope_, positions[static_cast<size_t>(t)], q, k, v);
    }
  });
}

void AttentionBlock::Attend(const Head& head, int worker) {
  WorkerScratch& scratch = workers_[static_cast<size_t>(worker)];
  ThreadPool inline_pool(1);
  const int64_t hd = config_.head_dim, keys = head.num_keys, qw = config_.query_width();
  const int64_t group = config_.num_heads / config_.num_kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
  Grow(scratch.keys, keys * hd);
  Grow(scratch.values, keys * hd);
  Grow(scratch.scores, std::min(kQueryBlock, head.num_queries) * keys);
  for (int64_t s = 0; s < keys; ++s) {
    // A copy once a head, because rows a power of two apart would share few cache lines.
    std::memcpy(scratch.keys.data() + s * hd, head.keys + s * head.ld_kv,
                static_cast<size_t>(hd) * sizeof(float));
    const float* value = head.values + s * head.ld_kv;
    for (int64_t d = 0; d < hd; ++d) scratch.values[static_cast<size_t>(d * keys + s)] = value[d];
  }
  const int64_t past = keys - head.num_queries;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t column = (head.kv_head * group + g) * hd;
    for (int64_t first = 0; first < head.num_queries; first += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, head.num_queries - first);
      const int64_t seen = past + first + rows;  // keys the block's last query sees
      float* scores = scratch.scores.data();
      scratch.packed.Pack(head.q + first * qw + column, rows, hd, qw, inline_pool);
      MatMulSingle(scratch.packed, AsMatrix(scratch.keys.data(), seen, hd, hd), scores, seen);
      for (int64_t i = 0; i < rows; ++i) {
        float* row = scores + i * seen;
        const int64_t last = past + first + i;  // newest key this query may see
        const int64_t oldest = config_.attention_window > 0
                                   ? std::max<int64_t>(0, last + 1 - config_.attention_window)
                                   : 0;
        for (int64_t s = oldest; s <= last; ++s) row[s] *= scale;
        Softmax(row + oldest, 1, last + 1 - oldest, last + 1 - oldest);
        std::fill(row, row + oldest, 0.0f);
        std::fill(row + last + 1, row + seen, 0.0f);
      }
      // Keys beyond a query's own position have weight exactly 0 and add exactly nothing.
      scratch.packed.Pack(scores, rows, seen, seen, inline_pool);
      MatMulSingle(scratch.packed, AsMatrix(scratch.values.data(), hd, seen, keys),
                   head.out + first * qw + column, qw);
    }
  }
}

void AttentionBlock::Output(const LayerWeights& weights, int64_t n, float* hidden) {
  const int64_t h = config_.hidden_size, qw = config_.query_width();
  packed_.Pack(attended_.data(), n, qw, qw, pool_);
  Grow(projected_, n * h);
  MatMul(packed_, weights.o, projected_.data(), h, pool_, precision_);
  constexpr int64_t kRows = 64;
  pool_.Run((n + kRows - 1) / kRows, [&](int64_t task, int) {
    const int64_t end = std::min(n, (task + 1) * kRows);
    for (int64_t t = task * kRows; t < end; ++t) {
      float* row = projected_.data() + t * h;
      if (!weights.o_bias.empty()) AddInPlace(row, weights.o_bias.data(), h);
      AddInPlace(hidden + t * h, row, h);
    }
  });
}

void AttentionBlock::Run(const LayerWeights& weights, std::span<const int64_t> lengths,
                         float* hidden) {
  std::vector<int64_t> positions;
  int64_t longest = 0;
  for (const int64_t length : lengths) {
    longest = std::max(longest, length);
    for (int64_t i = 0; i < length; ++i) positions.push_back(i);
  }
  const auto n = static_cast<int64_t>(positions.size());
  if (n == 0) return;
  rope_.Extend(longest);
  Project(weights, n, hidden);
  NormAndRotate(weights, n, positions);
  const int64_t qw = config_.query_width(), kvw = config_.kv_width(), hd = config_.head_dim;
  Grow(attended_, n * qw);
  std::vector<Head> heads;
  int64_t start = 0;
  for (const int64_t length : lengths) {
    for (int64_t g = 0; g < config_.num_kv_heads && length > 0; ++g) {
      heads.push_back({q_.data() + start * qw, attended_.data() + start * qw,
                       k_.data() + start * kvw + g * hd, v_.data() + start * kvw + g * hd, kvw, g,
                       length, length});
    }
    start += length;
  }
  pool_.Run(static_cast<int64_t>(heads.size()),
            [&](int64_t task, int worker) { Attend(heads[static_cast<size_t>(task)], worker); });
  Output(weights, n, hidden);
}

void AttentionBlock::RunCached(const LayerWeights& weights, int64_t past, int64_t n,
                               int64_t capacity, LayerCache& cache, float* hidden) {
  if (n == 0) return;
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < n; ++i) positions.push_back(past + i);
  rope_.Extend(past + n);
  Project(weights, n, hidden);
  NormAndRotate(weights, n, positions);
  const int64_t qw = config_.query_width(), kvw = config_.kv_width(), hd = config_.head_dim;
  Grow(attended_, n * qw);
  pool_.Run(config_.num_kv_heads, [&](int64_t g, int worker) {
    float* keys = cache.keys.data() + g * capacity * hd;
    float* values = cache.values.data() + g * capacity * hd;
    for (int64_t i = 0; i < n; ++i) {
      const auto bytes = static_cast<size_t>(hd) * sizeof(float);
      std::memcpy(keys + (past + i) * hd, k_.data() + i * kvw + g * hd, bytes);
      std::memcpy(values + (past + i) * hd, v_.data() + i * kvw + g * hd, bytes);
    }
    Attend({q_.data(), attended_.data(), keys, values, hd, g, n, past + n}, worker);
  });
  Output(weights, n, hidden);
}

uint64_t AttentionBlock::ScratchBytes(const ModelConfig& config, int64_t n, int64_t longest,
                                      int num_threads) {
  const int64_t h = config.hidden_size, qw = config.query_width(), kvw = config.kv_width();
  const int64_t queries = std::min(kQueryBlock, longest);
  const int64_t floats = n * (2 * h + 2 * qw + 2 * kvw) + longest * config.head_dim;
  const int64_t per_worker = longest * (2 * config.head_dim + queries);
  return static_cast<uint64_t>(floats) * sizeof(float) + PackedRows::Bytes(n, std::max(h, qw)) +
         static_cast<uint64_t>(num_threads) *
             (static_cast<uint64_t>(per_worker) * sizeof(float) +
              PackedRows::Bytes(queries, std::max(longest, config.head_dim)));
}

}  // namespace winnow
