#include "generate/generator.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

#include "base/error.h"
#include "forward/attention.h"
#include "forward/feed_forward.h"
#include "forward/kv_cache.h"
#include "forward/logits.h"
#include "generate/batch_runner.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kPromptChunk = BatchRunner::kChunkTokens;

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

}  // namespace

GeneratePlan PlanGenerate(const Model& model, int64_t capacity, const GenerateOptions& options,
                          int num_threads) {
  const ModelConfig& config = model.config();
  const int64_t chunk = std::min(kPromptChunk, capacity);
  GeneratePlan plan;
  plan.memory = BatchRunner::Plan(
      model, {.context_tokens = capacity, .kept_experts = options.kept_experts}, num_threads);
  if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  plan.resident = false;
  plan.memory = MemoryPlan{};
  plan.memory.Add("program", kProgramBytes);
  plan.memory.Add("weights of two layers", 2 * LayerReader::LargestLayerBytes(
                                                   model, {.kept_experts = options.kept_experts}));
  plan.memory.Add("lm_head",
                  model.lm_head().bytes() / static_cast<uint64_t>(config.vocab_size) *
                      static_cast<uint64_t>(std::min(kVocabularyChunk, config.vocab_size)));
  plan.memory.Add("key-value cache", KeyValueCache::Bytes(config.num_layers(), config.num_kv_heads,
                                                          config.head_dim, capacity));
  plan.memory.Add("work", AttentionBlock::ScratchBytes(config, chunk, capacity, num_threads) +
                              FeedForwardBlock::ScratchBytes(config, false) +
                              static_cast<uint64_t>(config.vocab_size) * sizeof(float));
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

// Where a sequence's next logits come from: all of the model in memory, or a layer at a time.
class Generator::NextLogits {
 public:
  virtual ~NextLogits() = default;
  virtual int64_t length() const = 0;
  virtual void Truncate(int64_t length) = 0;
  // Appends tokens of a prompt; the logits [vocab_size] after the last of them.
  virtual void Append(std::span<const int32_t> ids, std::span<float> logits) = 0;
  // The same for one token that was generated.
  virtual void AppendNew(int32_t token, std::span<float> logits) = 0;
  virtual std::optional<SkipCounts> skipping() const = 0;
};

class Generator::ResidentModel : public NextLogits {
 public:
  ResidentModel(const Model& model, int64_t capacity, const GenerateOptions& options,
                ThreadPool& pool, const JobControl& control)
      : skips_(!options.skip_betas.empty()),
        runner_(model,
                {.context_tokens = capacity,
                 .compute = options.compute,
                 .kept_experts = options.kept_experts,
                 .skip_betas = options.skip_betas},
                pool, control) {}

  int64_t length() const override { return runner_.length(0); }
  void Truncate(int64_t length) override { runner_.Truncate(0, length); }
  void Append(std::span<const int32_t> ids, std::span<float> logits) override {
    runner_.Prefill(0, ids, 1, [&](int64_t, std::span<const float> row) {
      std::copy(row.begin(), row.end(), logits.begin());
    });
  }
  void AppendNew(int32_t token, std::span<float> logits) override {
    const DecodeEntry entry = {.slot = 0, .token = token};
    runner_.Decode(std::span(&entry, 1), logits);
  }
  std::optional<SkipCounts> skipping() const override {
    return skips_ ? std::optional(runner_.skip_counts()) : std::nullopt;
  }
  const BatchRunner& runner() const { return runner_; }

 private:
  bool skips_;
  BatchRunner runner_;
};

class Generator::StreamedModel : public NextLogits {
 public:
  StreamedModel(const Model& model, int64_t capacity, const GenerateOptions& options,
                ThreadPool& pool, const JobControl& control)
      : model_(model),
        pool_(pool),
        control_(control),
        reader_(model, {.kept_experts = options.kept_experts}),
        attention_(model.config(), pool, options.compute),
        feed_forward_(model.config(), pool, options.compute),
        cache_(model.config().num_layers(), model.config().num_kv_heads, model.config().head_dim,
               capacity),
        skips_(!options.skip_betas.empty()) {
    if (skips_) feed_forward_.SetSkipping(options.skip_betas);
  }

  int64_t length() const override { return cache_.length(); }
  void Truncate(int64_t length) override { cache_.Advance(length - cache_.length()); }
  void Append(std::span<const int32_t> ids, std::span<float> logits) override {
    const auto n = static_cast<int64_t>(ids.size());
    const int64_t h = model_.config().hidden_size;
    if (hidden_.size() < static_cast<size_t>(n * h)) {
      hidden_ = AlignedBuffer<float>(static_cast<size_t>(n * h));
    }
    LoadEmbeddings(model_, ids, hidden_.data());
    for (int64_t layer = 0; layer < model_.config().num_layers(); ++layer) {
      control_.Poll();
      const LayerWeights& weights = reader_.Get(layer);
      attention_.RunCached(weights, cache_.length(), n, cache_.capacity(), cache_.layer(layer),
                           hidden_.data());
      feed_forward_.Run(weights, {.layer = layer}, n, hidden_.data());
    }
    cache_.Advance(n);
    ComputeLogits(model_, pool_, hidden_.data() + (n - 1) * h, 1, logits.data());
  }
  void AppendNew(int32_t token, std::span<float> logits) override {
    Append(std::span(&token, 1), logits);
  }
  std::optional<SkipCounts> skipping() const override {
    return skips_ ? std::optional(feed_forward_.skip_counts()) : std::nullopt;
  }

 private:
  const Model& model_;
  ThreadPool& pool_;
  const JobControl control_;
  LayerReader reader_;
  AttentionBlock attention_;
  FeedForwardBlock feed_forward_;
  KeyValueCache cache_;
  AlignedBuffer<float> hidden_;
  bool skips_;
};

Generator::Generator(const Model& model, int64_t capacity, GenerateOptions options,
                     const GeneratePlan& plan, ThreadPool& pool, const JobControl& control)
    : model_(model), capacity_(capacity), options_(std::move(options)) {
  const auto start = std::chrono::steady_clock::now();
  if (plan.resident) {
    auto resident = std::make_unique<ResidentModel>(model, capacity, options_, pool, control);
    resident_ = resident.get();
    next_ = std::move(resident);
  } else {
    next_ = std::make_unique<StreamedModel>(model, capacity, options_, pool, control);
  }
  load_seconds_ = Seconds(start);
}

Generator::~Generator() = default;

// Prompt tokens after what the cache holds of them already; returns how many it held.
int64_t Generator::ReadPrompt(std::span<const int32_t> prompt, std::span<float> logits) {
  // The last token is always given again: its logits are wanted.
  const auto most = std::min(prompt_.size(), prompt.size() - 1);
  const auto shared = static_cast<size_t>(
      std::mismatch(prompt_.begin(), prompt_.begin() + static_cast<std::ptrdiff_t>(most),
                    prompt.begin())
          .first -
      prompt_.begin());
  next_->Truncate(static_cast<int64_t>(shared));
  prompt_.resize(shared);
  for (size_t first = shared; first < prompt.size();) {
    const size_t rows = std::min(static_cast<size_t>(kPromptChunk), prompt.size() - first);
    next_->Append(prompt.subspan(first, rows), logits);
    first += rows;
  }
  prompt_.assign(prompt.begin(), prompt.end());
  return static_cast<int64_t>(shared);
}

GenerateResult Generator::Run(std::span<const int32_t> prompt,
                              const std::function<bool(int32_t)>& on_token) {
  if (prompt.empty()) {
    throw UsageError("the prompt has no tokens",
                     "give some text: this model adds no BOS by itself");
  }
  const ModelConfig& config = model_.config();
  const int64_t room = capacity_ - static_cast<int64_t>(prompt.size());
  if (room < 1) {
    throw UsageError(
        fmt::format("the prompt has {} tokens, the context is {}", prompt.size(), capacity_),
        "give a larger --context, or start anew");
  }
  const int64_t most = std::min(options_.max_new_tokens, room);
  GenerateResult result;
  result.load_seconds = load_seconds_;
  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  auto start = std::chrono::steady_clock::now();
  result.cached_tokens = ReadPrompt(prompt, logits);
  result.prompt_seconds = Seconds(start);
  start = std::chrono::steady_clock::now();
  uint64_t state = options_.sampling.seed;
  for (int64_t i = 0; i < most; ++i) {
    const int32_t token = DrawToken(logits, options_.vocabulary_limit, options_.sampling, state);
    const bool eos = std::find(config.eos_token_ids.begin(), config.eos_token_ids.end(), token) !=
                     config.eos_token_ids.end();
    if (eos && options_.stop_at_eos) break;
    result.tokens.push_back(token);
    if (!on_token(token) || i + 1 == most) break;
    next_->AppendNew(token, logits);
    ++result.decoded_tokens;
  }
  result.decode_seconds = Seconds(start);
  result.skipping = next_->skipping();
  if (resident_ != nullptr && result.decoded_tokens > 0) {
    result.bytes_per_token = resident_->runner().mean_bytes_per_token();
    result.experts_per_token = resident_->runner().mean_experts_per_token();
  }
  return result;
}

GenerateResult Generate(const Model& model, std::span<const int32_t> prompt,
                        const GenerateOptions& options, const GeneratePlan& plan, ThreadPool& pool,
                        const JobControl& control, const std::function<bool(int32_t)>& on_token) {
  const int64_t capacity = static_cast<int64_t>(prompt.size()) + options.max_new_tokens;
  return Generator(model, capacity, options, plan, pool, control).Run(prompt, on_token);
}

}  // namespace winnow
