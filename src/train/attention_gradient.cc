#include "train/attention_gradient.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "forward/attention.h"
#include "kernels/backward.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

constexpr int64_t kQueryBlock = 128;  // queries scored at once

}  // namespace

struct AttentionGradient::Scratch {
  AlignedBuffer<float> keys, values, queries, d_out;  // [keys or queries, head_dim]
  AlignedBuffer<float> scores, d_scores;              // [kQueryBlock, keys]
  AlignedBuffer<float> d_keys, d_values, part;        // [keys, head_dim]
  PackedRows packed;
};

struct AttentionGradient::Head {
  int64_t start = 0;  // first token of the row
  int64_t length = 0;
  int64_t kv_head = 0;
  const uint8_t* mask = nullptr;  // of the row's positions, or null
};

AttentionGradient::AttentionGradient(const ModelConfig& config, ThreadPool& pool,
                                     ComputePrecision precision)
    : config_(config),
      pool_(pool),
      precision_(precision),
      rope_(config.rope, config.head_dim),
      products_(pool),
      scratch_(static_cast<size_t>(pool.num_threads())) {}

AttentionGradient::~AttentionGradient() = default;

std::vector<AttentionGradient::Head> AttentionGradient::Heads(const TrainBatch& batch) const {
  std::vector<Head> heads;
  int64_t start = 0;
  for (const int64_t length : batch.lengths) {
    const uint8_t* mask = batch.key_mask.empty() ? nullptr : batch.key_mask.data() + start;
    for (int64_t g = 0; g < config_.num_kv_heads && length > 0; ++g) {
      heads.push_back({start, length, g, mask});
    }
    start += length;
  }
  return heads;
}

void AttentionGradient::Forward(const LayerWeights& weights, const TrainBatch& batch,
                                const float* before, float* after, AttentionTape& tape) {
  const int64_t h = config_.hidden_size, qw = config_.query_width(), kvw = config_.kv_width();
  const int64_t n = batch.num_tokens();
  GrowBuffer(tape.normed, n * h);
  GrowBuffer(tape.q, n * qw);
  GrowBuffer(tape.k, n * kvw);
  GrowBuffer(tape.v, n * kvw);
  GrowBuffer(tape.attended, n * qw);
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    RmsNorm(before + first * h, end - first, h, h, weights.input_norm.data(), config_.rms_norm_eps,
            tape.normed.data() + first * h, h);
  });
  packed_.Pack(tape.normed.data(), n, h, h, pool_);
  MatMul(packed_, weights.q, tape.q.data(), qw, pool_, precision_);
  MatMul(packed_, weights.k, tape.k.data(), kvw, pool_, precision_);
  MatMul(packed_, weights.v, tape.v.data(), kvw, pool_, precision_);
  NormAndRotate(weights, batch, tape);
  const std::vector<Head> heads = Heads(batch);
  pool_.Run(static_cast<int64_t>(heads.size()), [&](int64_t task, int worker) {
    Attend(heads[static_cast<size_t>(task)], tape, worker);
  });
  packed_.Pack(tape.attended.data(), n, qw, qw, pool_);
  GrowBuffer(projected_, n * h);
  MatMul(packed_, weights.o, projected_.data(), h, pool_, precision_);
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      float* row = projected_.data() + t * h;
      if (!weights.o_bias.empty()) AddInPlace(row, weights.o_bias.data(), h);
      std::memcpy(after + t * h, before + t * h, static_cast<size_t>(h) * sizeof(float));
      AddInPlace(after + t * h, row, h);
    }
  });
}

void AttentionGradient::NormAndRotate(const LayerWeights& weights, const TrainBatch& batch,
                                      AttentionTape& tape) {
  const int64_t qw = config_.query_width(), kvw = config_.kv_width();
  const int64_t n = batch.num_tokens();
  std::vector<int64_t> positions;
  for (const int64_t length : batch.lengths) {
    for (int64_t i = 0; i < length; ++i) positions.push_back(i);
  }
  rope_.Extend(batch.longest());
  if (keeps_raw()) {
    GrowBuffer(tape.raw_q, n * qw);
    GrowBuffer(tape.raw_k, n * kvw);
    GrowBuffer(tape.raw_v, n * kvw);
  }
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      float* q = tape.q.data() + t * qw;
      float* k = tape.k.data() + t * kvw;
      float* v = tape.v.data() + t * kvw;
      if (!weights.q_bias.empty()) {
        AddInPlace(q, weights.q_bias.data(), qw);
        AddInPlace(k, weights.k_bias.data(), kvw);
        AddInPlace(v, weights.v_bias.data(), kvw);
      }
      if (keeps_raw()) {
        std::copy_n(q, qw, tape.raw_q.data() + t * qw);
        std::copy_n(k, kvw, tape.raw_k.data() + t * kvw);
        std::copy_n(v, kvw, tape.raw_v.data() + t * kvw);
      }
      NormAndRotateToken(config_, weights, rope_, positions[static_cast<size_t>(t)], q, k, v);
    }
  });
}

int64_t AttentionGradient::Probabilities(const Head& head, int64_t q_head, int64_t first,
                                         int64_t rows, const AttentionTape& tape,
                                         Scratch& scratch) const {
  ThreadPool inline_pool(1);
  const int64_t hd = config_.head_dim, qw = config_.query_width();
  const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
  // With hidden keys a query may attend to later positions too.
  const int64_t seen = head.mask == nullptr ? first + rows : head.length;
  float* scores = scratch.scores.data();
  scratch.packed.Pack(tape.q.data() + (head.start + first) * qw + q_head * hd, rows, hd, qw,
                      inline_pool);
  MatMulSingle(scratch.packed, F32Matrix(scratch.keys.data(), seen, hd), scores, seen);
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * seen;
    const int64_t last = first + i;
    const int64_t oldest = config_.attention_window > 0
                               ? std::max<int64_t>(0, last + 1 - config_.attention_window)
                               : 0;
    const bool sees_any =
        head.mask == nullptr || std::any_of(head.mask + oldest, head.mask + last + 1,
                                            [](uint8_t visible) { return visible != 0; });
    if (!sees_any) {
      for (int64_t s = 0; s < seen; ++s) row[s] *= scale;
      Softmax(row, 1, seen, seen);
      continue;
    }
    for (int64_t s = oldest; s <= last; ++s) {
      row[s] = head.mask == nullptr || head.mask[s] != 0 ? row[s] * scale : kHidden;
    }
    Softmax(row + oldest, 1, last + 1 - oldest, last + 1 - oldest);
    std::fill(row, row + oldest, 0.0f);
    std::fill(row + last + 1, row + seen, 0.0f);
  }
  return seen;
}

void AttentionGradient::Attend(const Head& head, AttentionTape& tape, int worker) {
  Scratch& scratch = scratch_[static_cast<size_t>(worker)];
  ThreadPool inline_pool(1);
  const int64_t hd = config_.head_dim, qw = config_.query_width(), kvw = config_.kv_width();
  const int64_t group = config_.num_heads / config_.num_kv_heads, n = head.length;
  GrowBuffer(scratch.keys, n * hd);
  GrowBuffer(scratch.values, n * hd);
  GrowBuffer(scratch.scores, std::min(kQueryBlock, n) * n);
  for (int64_t s = 0; s < n; ++s) {
    const int64_t at = (head.start + s) * kvw + head.kv_head * hd;
    std::copy_n(tape.k.data() + at, hd, scratch.keys.data() + s * hd);
    std::copy_n(tape.v.data() + at, hd, scratch.values.data() + s * hd);
  }
  for (int64_t g = 0; g < group; ++g) {
    const int64_t q_head = head.kv_head * group + g;
    for (int64_t first = 0; first < n; first += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, n - first);
      const int64_t seen = Probabilities(head, q_head, first, rows, tape, scratch);
      scratch.packed.Pack(scratch.scores.data(), rows, seen, seen, inline_pool);
      MatMulTransposedSingle(scratch.packed, F32Matrix(scratch.values.data(), seen, hd),
                             tape.attended.data() + (head.start + first) * qw + q_head * hd, qw);
    }
  }
}

// With P = softmax(S), O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dP P)), dQ = dS K,
// dK = dS^T Q, the scale of S folded into dS.
void AttentionGradient::AttendBackward(const Head& head, const AttentionTape& tape, int worker) {
  Scratch& scratch = scratch_[static_cast<size_t>(worker)];
  ThreadPool inline_pool(1);
  const int64_t hd = config_.head_dim, qw = config_.query_width(), kvw = config_.kv_width();
  const int64_t group = config_.num_heads / config_.num_kv_heads, n = head.length;
  const int64_t block = std::min(kQueryBlock, n);
  const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
  for (AlignedBuffer<float>* buffer :
       {&scratch.keys, &scratch.values, &scratch.d_keys, &scratch.d_values, &scratch.part}) {
    GrowBuffer(*buffer, n * hd);
  }
  GrowBuffer(scratch.scores, block * n);
  GrowBuffer(scratch.d_scores, block * n);
  GrowBuffer(scratch.queries, block * hd);
  GrowBuffer(scratch.d_out, block * hd);
  for (int64_t s = 0; s < n; ++s) {
    const int64_t at = (head.start + s) * kvw + head.kv_head * hd;
    std::copy_n(tape.k.data() + at, hd, scratch.keys.data() + s * hd);
    std::copy_n(tape.v.data() + at, hd, scratch.values.data() + s * hd);
  }
  std::fill_n(scratch.d_keys.data(), n * hd, 0.0f);
  std::fill_n(scratch.d_values.data(), n * hd, 0.0f);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t q_head = head.kv_head * group + g;
    for (int64_t first = 0; first < n; first += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, n - first);
      const int64_t seen = Probabilities(head, q_head, first, rows, tape, scratch);
      const int64_t at = (head.start + first) * qw + q_head * hd;
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(tape.q.data() + at + i * qw, hd, scratch.queries.data() + i * hd);
        std::copy_n(d_attended_.data() + at + i * qw, hd, scratch.d_out.data() + i * hd);
      }
      scratch.packed.PackTransposed(scratch.scores.data(), seen, rows, seen, inline_pool);
      MatMulTransposedSingle(scratch.packed, F32Matrix(scratch.d_out.data(), rows, hd),
                             scratch.part.data(), hd);
      AddInPlace(scratch.d_values.data(), scratch.part.data(), seen * hd);
      scratch.packed.Pack(scratch.d_out.data(), rows, hd, hd, inline_pool);
      MatMulSingle(scratch.packed, F32Matrix(scratch.values.data(), seen, hd),
                   scratch.d_scores.data(), seen);
      for (int64_t i = 0; i < rows; ++i) {
        SoftmaxBackward(scratch.scores.data() + i * seen, scale, seen,
                        scratch.d_scores.data() + i * seen);
      }
      scratch.packed.PackTransposed(scratch.d_scores.data(), seen, rows, seen, inline_pool);
      MatMulTransposedSingle(scratch.packed, F32Matrix(scratch.queries.data(), rows, hd),
                             scratch.part.data(), hd);
      AddInPlace(scratch.d_keys.data(), scratch.part.data(), seen * hd);
      scratch.packed.Pack(scratch.d_scores.data(), rows, seen, seen, inline_pool);
      MatMulTransposedSingle(scratch.packed, F32Matrix(scratch.keys.data(), seen, hd),
                             d_q_.data() + at, qw);
    }
  }
  for (int64_t s = 0; s < n; ++s) {
    const int64_t at = (head.start + s) * kvw + head.kv_head * hd;
    std::copy_n(scratch.d_keys.data() + s * hd, hd, d_k_.data() + at);
    std::copy_n(scratch.d_values.data() + s * hd, hd, d_v_.data() + at);
  }
}

void AttentionGradient::UnrotateAndUnnorm(const LayerWeights& weights, const TrainBatch& batch,
                                          const AttentionTape& tape, const GradientSlots& slots) {
  const int64_t qw = config_.query_width(), kvw = config_.kv_width(), hd = config_.head_dim;
  const int64_t n = batch.num_tokens(), half = rope_.half();
  std::vector<int64_t> positions;
  for (const int64_t length : batch.lengths) {
    for (int64_t i = 0; i < length; ++i) positions.push_back(i);
  }
  // The transpose of a rotation is the rotation by the negative angle.
  std::vector<float> backwards(static_cast<size_t>(batch.longest() * half));
  for (int64_t i = 0; i < batch.longest() * half; ++i) {
    backwards[static_cast<size_t>(i)] = -rope_.sin(0)[i];
  }
  ForRowRanges(pool_, n, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      const int64_t position = positions[static_cast<size_t>(t)];
      const float* sin = backwards.data() + position * half;
      RopeHalf(d_q_.data() + t * qw, config_.num_heads, hd, half, rope_.cos(position), sin);
      RopeHalf(d_k_.data() + t * kvw, config_.num_kv_heads, hd, half, rope_.cos(position), sin);
    }
  });
  if (!keeps_raw()) return;
  const float limit = config_.clip_qkv ? *config_.clip_qkv : std::numeric_limits<float>::infinity();
  const auto unclip = [&](const float* value, float* gradient, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (value[i] < -limit || value[i] > limit) gradient[i] = 0;
    }
  };
  const auto undo = [&](const AlignedBuffer<float>& raw, AlignedBuffer<float>& gradient,
                        int64_t width, const std::vector<float>& norm, float* slot) {
    if (norm.empty()) {
      unclip(raw.data(), gradient.data(), n * width);
      return;
    }
    const int64_t part = config_.qk_norm == QkNorm::kPerHead ? hd : width;
    if (config_.clip_qkv) {  // clipping saw the normed values
      GrowBuffer(part_, n * width);
      RmsNorm(raw.data(), n * width / part, part, part, norm.data(), config_.rms_norm_eps,
              part_.data(), part);
      unclip(part_.data(), gradient.data(), n * width);
    }
    GrowBuffer(d_raw_, n * width);
    std::fill_n(d_raw_.data(), n * width, 0.0f);
    products_.Norm(raw.data(), n, width / part, part, norm, config_.rms_norm_eps, gradient.data(),
                   d_raw_.data(), slot);
    std::copy_n(d_raw_.data(), n * width, gradient.data());
  };
  undo(tape.raw_q, d_q_, qw, weights.q_norm, slots.q_norm);
  undo(tape.raw_k, d_k_, kvw, weights.k_norm, slots.k_norm);
  unclip(tape.raw_v.data(), d_v_.data(), n * kvw);
}

void AttentionGradient::Backward(const LayerWeights& weights, const TrainBatch& batch,
                                 const float* before, const AttentionTape& tape, float* d_stream,
                                 const GradientSlots& slots, bool needs_input) {
  const int64_t h = config_.hidden_size, qw = config_.query_width(), kvw = config_.kv_width();
  const int64_t n = batch.num_tokens();
  if (slots.o != nullptr) products_.Weight(d_stream, n, h, tape.attended.data(), qw, slots.o);
  if (slots.o_bias != nullptr) products_.Bias(d_stream, n, h, slots.o_bias);
  if (!needs_input && !slots.any_projection()) return;
  GrowBuffer(d_attended_, n * qw);
  GrowBuffer(d_q_, n * qw);
  GrowBuffer(d_k_, n * kvw);
  GrowBuffer(d_v_, n * kvw);
  products_.Input(d_stream, n, weights.o, d_attended_.data());
  const std::vector<Head> heads = Heads(batch);
  rope_.Extend(batch.longest());
  pool_.Run(static_cast<int64_t>(heads.size()), [&](int64_t task, int worker) {
    AttendBackward(heads[static_cast<size_t>(task)], tape, worker);
  });
  UnrotateAndUnnorm(weights, batch, tape, slots);
  GrowBuffer(d_normed_, n * h);
  const auto project = [&](const AlignedBuffer<float>& gradient, int64_t width,
                           const WeightMatrix& w, float* slot, float* bias, bool first) {
    if (slot != nullptr) products_.Weight(gradient.data(), n, width, tape.normed.data(), h, slot);
    if (bias != nullptr) products_.Bias(gradient.data(), n, width, bias);
    if (!needs_input && slots.input_norm == nullptr) return;
    if (first) {
      products_.Input(gradient.data(), n, w, d_normed_.data());
      return;
    }
    GrowBuffer(part_, n * std::max(h, qw));
    products_.Input(gradient.data(), n, w, part_.data());
    ForRowRanges(pool_, n, [&](int64_t begin, int64_t end) {
      AddInPlace(d_normed_.data() + begin * h, part_.data() + begin * h, (end - begin) * h);
    });
  };
  project(d_q_, qw, weights.q, slots.q, slots.q_bias, true);
  project(d_k_, kvw, weights.k, slots.k, slots.k_bias, false);
  project(d_v_, kvw, weights.v, slots.v, slots.v_bias, false);
  if (!needs_input && slots.input_norm == nullptr) return;
  products_.Norm(before, n, 1, h, weights.input_norm, config_.rms_norm_eps, d_normed_.data(),
                 d_stream, slots.input_norm);
}

uint64_t AttentionGradient::TapeBytes(const ModelConfig& config, int64_t tokens) {
  const bool raw = config.qk_norm != QkNorm::kNone || config.clip_qkv;
  const int64_t qw = config.query_width(), kvw = config.kv_width();
  const int64_t floats = config.hidden_size + 2 * qw + 2 * kvw + (raw ? qw + 2 * kvw : 0);
  return static_cast<uint64_t>(tokens) * static_cast<uint64_t>(floats) * sizeof(float);
}

uint64_t AttentionGradient::ScratchBytes(const ModelConfig& config, int64_t tokens, int64_t longest,
                                         int num_threads) {
  const int64_t h = config.hidden_size, qw = config.query_width(), kvw = config.kv_width();
  const int64_t block = std::min(kQueryBlock, longest), hd = config.head_dim;
  const int64_t per_worker = 5 * longest * hd + 2 * block * (longest + hd);
  return static_cast<uint64_t>(tokens * (2 * h + 3 * qw + 2 * kvw + std::max(h, qw))) *
             sizeof(float) +
         2 * PackedRows::Bytes(tokens, std::max(h, qw)) +
         static_cast<uint64_t>(num_threads) * (static_cast<uint64_t>(per_worker) * sizeof(float) +
                                               PackedRows::Bytes(longest, std::max(block, hd)));
}

}  // namespace winnow
