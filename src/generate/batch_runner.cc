#include "generate/batch_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "forward/attention.h"
#include "forward/feed_forward.h"
#include "forward/kv_cache.h"
#include "forward/token_step.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/matvec.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kLogitRows = 16;  // positions whose logits are in memory at once

LayerReaderOptions ReaderOptions(const BatchOptions& options) {
  return {.prefetch = false, .keep_resident = true, .kept_experts = options.kept_experts};
}

}  // namespace

MemoryPlan BatchRunner::Plan(const Model& model, const BatchOptions& options, int num_threads) {
  const ModelConfig& config = model.config();
  const int64_t capacity = options.context_tokens;
  const int64_t chunk = std::min(kChunkTokens, capacity);
  MemoryPlan plan;
  plan.Add("weights of all layers", LayerReader::AllLayersBytes(model, ReaderOptions(options)));
  plan.Add("lm_head", model.lm_head().bytes());
  plan.Add("key-value caches", static_cast<uint64_t>(options.slots) *
                                   KeyValueCache::Bytes(config.num_layers(), config.num_kv_heads,
                                                        config.head_dim, capacity));
  plan.Add("work", AttentionBlock::ScratchBytes(config, chunk, capacity, num_threads) +
                       FeedForwardBlock::ScratchBytes(config, false) +
                       TokenStep::ScratchBytes(config, options.slots, capacity, num_threads) +
                       static_cast<uint64_t>(kLogitRows + options.slots) *
                           static_cast<uint64_t>(config.vocab_size) * sizeof(float));
  plan.Add("program", kProgramBytes);
  return plan;
}

int64_t BatchRunner::SlotsThatFit(const Model& model, BatchOptions options, int64_t wanted,
                                  int num_threads) {
  for (options.slots = wanted; options.slots > 0; --options.slots) {
    if (Plan(model, options, num_threads).total_bytes() <= options.memory_budget_bytes) break;
  }
  return options.slots;
}

struct BatchRunner::State {
  State(const Model& m, BatchOptions o, ThreadPool& p, const JobControl& c)
      : model(m),
        config(m.config()),
        options(std::move(o)),
        pool(p),
        control(c),
        reader(m, ReaderOptions(options)),
        attention(config, p, options.compute),
        feed_forward(config, p, options.compute),
        step(config, p) {}

  const Model& model;
  const ModelConfig& config;
  const BatchOptions options;
  ThreadPool& pool;
  const JobControl control;  // a copy: callers may pass a temporary
  LayerReader reader;
  AttentionBlock attention;
  FeedForwardBlock feed_forward;
  TokenStep step;
  LoadedMatrix head;
  std::vector<float> final_norm;
  std::vector<KeyValueCache> caches;  // of each slot
  AlignedBuffer<float> hidden, normed, logits;
  VectorRows head_rows;
  bool record_experts = false;
  ExpertUse use;
  SkipCounts decode_skips;
  // Of Decode, for averages.
  double decoded_tokens = 0, decoded_experts = 0, decoded_bytes = 0;
  uint64_t common_bytes = 0;  // weights every token reads
  int64_t moe_layers = 0;

  KeyValueCache& cache(int64_t slot) { return caches[static_cast<size_t>(slot)]; }
  double Beta(int64_t layer) const {
    const auto at = static_cast<size_t>(layer);
    return at < options.skip_betas.size() ? options.skip_betas[at] : 0.0;
  }
  void Record(int64_t moe_layer, int64_t tokens, const int32_t* ids) {
    if (!record_experts) return;
    const int64_t k = config.num_experts_per_tok;
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(ids + t * k, k, use.ids.begin() + (t * moe_layers + moe_layer) * k);
    }
  }
  void StartRecord(int64_t tokens) {
    use = {.moe_layers = moe_layers, .experts_per_token = config.num_experts_per_tok, .ids = {}};
    if (record_experts) {
      use.ids.resize(static_cast<size_t>(tokens * moe_layers * use.experts_per_token));
    }
  }
  // Of rows [n, hidden] after the last layer: logits [n, vocab_size], in the order of decoding.
  void Logits(const float* rows, int64_t n, float* out) {
    const int64_t h = config.hidden_size;
    if (static_cast<int64_t>(normed.size()) < n * h) {
      normed = AlignedBuffer<float>(static_cast<size_t>(n * h));
    }
    RmsNorm(rows, n, h, h, final_norm.data(), config.rms_norm_eps, normed.data(), h);
    head_rows.For(head.matrix, normed.data(), n, h, h);
    const MatVecJob job = {&head_rows, &head.matrix, out, config.vocab_size};
    MatVec(std::span(&job, 1), pool);
  }
  void CountDecoded(const LayerWeights& weights, int64_t layer, int64_t rows);
};

BatchRunner::BatchRunner(const Model& model, BatchOptions options, ThreadPool& pool,
                         const JobControl& control)
    : state_(std::make_unique<State>(model, std::move(options), pool, control)) {
  State& s = *state_;
  if (!s.options.skip_betas.empty()) {
    s.feed_forward.SetSkipping(s.options.skip_betas);
    s.decode_skips = SkipCounts(s.config.layers.size());
  }
  s.head = LoadRows(model, model.lm_head(), 0, s.config.vocab_size);
  s.final_norm = LoadVector(model, model.final_norm());
  for (int64_t i = 0; i < s.options.slots; ++i) {
    s.caches.emplace_back(s.config.num_layers(), s.config.num_kv_heads, s.config.head_dim,
                          s.options.context_tokens);
  }
  s.common_bytes = s.head.matrix.bytes();
  for (int64_t layer = 0; layer < s.config.num_layers(); ++layer) {
    control.Poll();
    s.reader.Get(layer);
    const LayerSlices& slices = model.layers()[static_cast<size_t>(layer)];
    const bool routed = s.config.layers[static_cast<size_t>(layer)].is_moe;
    s.common_bytes += slices.CommonBytes() + (routed ? 0 : slices.ExpertBytes());
    s.moe_layers += routed ? 1 : 0;
  }
}

BatchRunner::~BatchRunner() = default;

int64_t BatchRunner::slots() const {
  return state_->options.slots;
}
int64_t BatchRunner::context_tokens() const {
  return state_->options.context_tokens;
}
int64_t BatchRunner::vocab_size() const {
  return state_->config.vocab_size;
}
int64_t BatchRunner::length(int64_t slot) const {
  return state_->cache(slot).length();
}

void BatchRunner::Truncate(int64_t slot, int64_t length) {
  KeyValueCache& cache = state_->cache(slot);
  if (length < 0 || length > cache.length()) {
    throw RuntimeError(fmt::format("cut of a sequence of {} tokens to {}", cache.length(), length));
  }
  cache.Advance(length - cache.length());
}

void BatchRunner::CopyPrefix(int64_t from, int64_t to, int64_t length) {
  const ModelConfig& config = state_->config;
  KeyValueCache& source = state_->cache(from);
  KeyValueCache& target = state_->cache(to);
  if (length < 0 || length > source.length() || from == to) {
    throw RuntimeError(
        fmt::format("copy of {} tokens from a sequence of {}", length, source.length()));
  }
  target.Advance(-target.length());
  const int64_t head_floats = source.capacity() * config.head_dim;
  const size_t bytes = static_cast<size_t>(length * config.head_dim) * sizeof(float);
  for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
    for (int64_t head = 0; head < config.num_kv_heads; ++head) {
      const int64_t at = head * head_floats;
      std::memcpy(target.layer(layer).keys.data() + at, source.layer(layer).keys.data() + at,
                  bytes);
      std::memcpy(target.layer(layer).values.data() + at, source.layer(layer).values.data() + at,
                  bytes);
    }
  }
  target.Advance(length);
}

void BatchRunner::Prefill(
    int64_t slot, std::span<const int32_t> ids, int64_t wanted,
    const std::function<void(int64_t index, std::span<const float> logits)>& on_logits) {
  State& s = *state_;
  const auto n = static_cast<int64_t>(ids.size());
  const int64_t h = s.config.hidden_size, vocabulary = s.config.vocab_size;
  KeyValueCache& cache = s.cache(slot);
  if (n < 1 || n > kChunkTokens || cache.length() + n > cache.capacity()) {
    throw RuntimeError(fmt::format("{} tokens for a sequence of {}, which has room for {}", n,
                                   cache.length(), cache.capacity()));
  }
  CheckTokenIds(ids, s.config);
  if (s.hidden.size() < static_cast<size_t>(n * h)) {
    s.hidden = AlignedBuffer<float>(static_cast<size_t>(std::max(n, s.options.slots) * h));
  }
  LoadEmbeddings(s.model, ids, s.hidden.data());
  s.StartRecord(n);
  int64_t moe_layer = 0;
  for (int64_t layer = 0; layer < s.config.num_layers(); ++layer) {
    s.control.Poll();
    const LayerWeights& weights = s.reader.Get(layer);
    s.attention.RunCached(weights, cache.length(), n, cache.capacity(), cache.layer(layer),
                          s.hidden.data());
    s.feed_forward.Run(weights, {.layer = layer}, n, s.hidden.data());
    if (!weights.router.empty()) s.Record(moe_layer++, n, s.feed_forward.last_ids());
  }
  cache.Advance(n);
  // The last position as Decode computes it; the others, which only scores of a prompt need, in
  // groups whose size does not change a bit of them.
  const size_t floats = static_cast<size_t>(vocabulary);
  if (wanted > 0 && s.logits.size() < kLogitRows * floats) {
    s.logits = AlignedBuffer<float>(kLogitRows * floats);
  }
  for (int64_t first = n - wanted; first < n; first += kLogitRows) {
    const int64_t rows = std::min(kLogitRows, n - first);
    s.Logits(s.hidden.data() + first * h, rows, s.logits.data());
    for (int64_t i = 0; i < rows; ++i) {
      on_logits(first + i, {s.logits.data() + i * vocabulary, floats});
    }
  }
}

void BatchRunner::State::CountDecoded(const LayerWeights& weights, int64_t layer, int64_t rows) {
  for (const int32_t id : step.ids()) {
    if (IsSkipped(id)) continue;
    const FeedForwardWeights& expert = weights.experts[static_cast<size_t>(id)];
    decoded_bytes +=
        static_cast<double>(expert.gate.bytes() + expert.up.bytes() + expert.down.bytes());
    decoded_experts += 1;
  }
  if (decode_skips.tokens.empty()) return;
  decode_skips.Count(layer, rows, config.num_experts_per_tok, step.ids().data(),
                     step.dropped_weight().data());
}

void BatchRunner::Decode(std::span<const DecodeEntry> entries, std::span<float> logits) {
  State& s = *state_;
  const auto n = static_cast<int64_t>(entries.size());
  if (n == 0) return;
  const int64_t h = s.config.hidden_size;
  std::vector<int32_t> ids;
  std::vector<TokenRow> rows(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    KeyValueCache& cache = s.cache(entries[i].slot);
    if (cache.length() >= cache.capacity()) {
      throw RuntimeError(
          fmt::format("a sequence of {} tokens has no room for more", cache.length()));
    }
    ids.push_back(entries[i].token);
    rows[i] = {.position = cache.length(), .capacity = cache.capacity()};
  }
  CheckTokenIds(ids, s.config);
  if (s.hidden.size() < static_cast<size_t>(n * h)) {
    s.hidden = AlignedBuffer<float>(static_cast<size_t>(n * h));
  }
  LoadEmbeddings(s.model, ids, s.hidden.data());
  s.StartRecord(n);
  int64_t moe_layer = 0;
  for (int64_t layer = 0; layer < s.config.num_layers(); ++layer) {
    s.control.Poll();
    const LayerWeights& weights = s.reader.Get(layer);
    for (size_t i = 0; i < rows.size(); ++i) rows[i].cache = &s.cache(entries[i].slot).layer(layer);
    s.step.RunAttention(weights, rows, s.hidden.data());
    s.step.RunFeedForward(weights, n, s.Beta(layer), s.hidden.data());
    if (weights.router.empty()) continue;
    s.CountDecoded(weights, layer, n);
    s.Record(moe_layer++, n, s.step.ids().data());
  }
  for (const DecodeEntry& entry : entries) s.cache(entry.slot).Advance(1);
  s.decoded_tokens += static_cast<double>(n);
  s.Logits(s.hidden.data(), n, logits.data());
}

void BatchRunner::RecordExperts(bool on) {
  state_->record_experts = on;
}
const ExpertUse& BatchRunner::last_experts() const {
  return state_->use;
}

SkipCounts BatchRunner::skip_counts() const {
  SkipCounts sum = state_->feed_forward.skip_counts();
  sum.Add(state_->decode_skips);
  return sum;
}

double BatchRunner::mean_bytes_per_token() const {
  const State& s = *state_;
  const double tokens = std::max(1.0, s.decoded_tokens);
  return static_cast<double>(s.common_bytes) + s.decoded_bytes / tokens;
}

double BatchRunner::mean_experts_per_token() const {
  const State& s = *state_;
  const double layers = static_cast<double>(s.moe_layers) * std::max(1.0, s.decoded_tokens);
  return s.moe_layers == 0 ? 0.0 : s.decoded_experts / layers;
}

}  // namespace winnow
