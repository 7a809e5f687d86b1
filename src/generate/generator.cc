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

GeneratePlan PlanGenerate(const Model& model, int64_t prompt_tokens, const GenerateOptions& options,
                          int num_threads) {
  const ModelConfig& config = model.config();
  const int64_t capacity = prompt_tokens + options.max_new_tokens;
  const int64_t chunk = std::min(kPromptChunk, std::max<int64_t>(1, prompt_tokens));
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

namespace {

// Where a sequence's next logits come from: all of the model in memory, or a layer at a time.
class NextLogits {
 public:
  virtual ~NextLogits() = default;
  // Appends tokens; the logits [vocab_size] after the last of them.
  virtual void Append(std::span<const int32_t> ids, std::span<float> logits) = 0;
  virtual std::optional<SkipCounts> skipping() const = 0;
};

class ResidentModel : public NextLogits {
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

  void Append(std::span<const int32_t> ids, std::span<float> logits) override {
    if (runner_.length(0) > 0 && ids.size() == 1) {
      const DecodeEntry entry = {.slot = 0, .token = ids[0]};
      runner_.Decode(std::span(&entry, 1), logits);
      return;
    }
    runner_.Prefill(0, ids, 1, [&](int64_t, std::span<const float> row) {
      std::copy(row.begin(), row.end(), logits.begin());
    });
  }
  std::optional<SkipCounts> skipping() const override {
    return skips_ ? std::optional(runner_.skip_counts()) : std::nullopt;
  }
  const BatchRunner& runner() const { return runner_; }

 private:
  bool skips_;
  BatchRunner runner_;
};

class StreamedModel : public NextLogits {
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
  std::optional<SkipCounts> skipping() const override {
    return skips_ ? std::optional(feed_forward_.skip_counts()) : std::nullopt;
  }

 private:
  const Model& model_;
  ThreadPool& pool_;
  const JobControl& control_;
  LayerReader reader_;
  AttentionBlock attention_;
  FeedForwardBlock feed_forward_;
  KeyValueCache cache_;
  AlignedBuffer<float> hidden_;
  bool skips_;
};

}  // namespace

GenerateResult Generate(const Model& model, std::span<const int32_t> prompt,
                        const GenerateOptions& options, const GeneratePlan& plan, ThreadPool& pool,
                        const JobControl& control, const std::function<bool(int32_t)>& on_token) {
  if (prompt.empty()) {
    throw UsageError("the prompt has no tokens",
                     "give some text: this model adds no BOS by itself");
  }
  const ModelConfig& config = model.config();
  const auto prompt_tokens = static_cast<int64_t>(prompt.size());
  const int64_t capacity = prompt_tokens + options.max_new_tokens;
  std::unique_ptr<NextLogits> next;
  const ResidentModel* resident = nullptr;
  auto start = std::chrono::steady_clock::now();
  GenerateResult result;
  if (plan.resident) {
    auto made = std::make_unique<ResidentModel>(model, capacity, options, pool, control);
    resident = made.get();
    next = std::move(made);
  } else {
    next = std::make_unique<StreamedModel>(model, capacity, options, pool, control);
  }
  result.load_seconds = Seconds(start);
  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  start = std::chrono::steady_clock::now();
  for (int64_t first = 0; first < prompt_tokens; first += kPromptChunk) {
    const int64_t rows = std::min(kPromptChunk, prompt_tokens - first);
    next->Append(prompt.subspan(static_cast<size_t>(first), static_cast<size_t>(rows)), logits);
  }
  result.prompt_seconds = Seconds(start);
  start = std::chrono::steady_clock::now();
  uint64_t state = options.sampling.seed;
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    size_t limit = logits.size();
    if (options.vocabulary_limit > 0) {
      limit = std::min(limit, static_cast<size_t>(options.vocabulary_limit));
    }
    const int32_t token =
        SampleToken(std::span<const float>(logits).first(limit), options.sampling, state);
    if (!std::isfinite(logits[static_cast<size_t>(token)])) {
      throw ModelError("the model's scores are not finite",
                       "the weights hold NaN or Inf: see winnow doctor MODEL");
    }
    const bool eos = std::find(config.eos_token_ids.begin(), config.eos_token_ids.end(), token) !=
                     config.eos_token_ids.end();
    if (eos && options.stop_at_eos) break;
    result.tokens.push_back(token);
    if (!on_token(token) || i + 1 == options.max_new_tokens) break;
    next->Append(std::span(&token, 1), logits);
  }
  result.decode_seconds = Seconds(start);
  result.skipping = next->skipping();
  if (resident != nullptr && result.tokens.size() > 1) {
    result.bytes_per_token = resident->runner().mean_bytes_per_token();
    result.experts_per_token = resident->runner().mean_experts_per_token();
  }
  return result;
}

}  // namespace winnow
