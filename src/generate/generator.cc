#include "generate/generator.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/error.h"
#include "forward/attention.h"
#include "forward/feed_forward.h"
#include "forward/kv_cache.h"
#include "forward/logits.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kPromptChunk = 512;  // prompt tokens that go through the layers together

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
  for (const bool resident : {true, false}) {
    plan.resident = resident;
    plan.memory = MemoryPlan{};
    plan.memory.Add("program", kProgramBytes);
    const LayerReaderOptions reading{.kept_experts = options.kept_experts};
    plan.memory.Add(resident ? "weights of all layers" : "weights of two layers",
                    resident ? LayerReader::AllLayersBytes(model, reading)
                             : 2 * LayerReader::LargestLayerBytes(model, reading));
    const int64_t head_rows =
        resident ? config.vocab_size : std::min(kVocabularyChunk, config.vocab_size);
    plan.memory.Add("lm_head", model.lm_head().bytes() / static_cast<uint64_t>(config.vocab_size) *
                                   static_cast<uint64_t>(head_rows));
    plan.memory.Add(
        "key-value cache",
        KeyValueCache::Bytes(config.num_layers(), config.num_kv_heads, config.head_dim, capacity));
    plan.memory.Add("work", AttentionBlock::ScratchBytes(config, chunk, capacity, num_threads) +
                                FeedForwardBlock::ScratchBytes(config, false) +
                                static_cast<uint64_t>(config.vocab_size) * sizeof(float));
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

GenerateResult Generate(const Model& model, std::span<const int32_t> prompt,
                        const GenerateOptions& options, const GeneratePlan& plan, ThreadPool& pool,
                        const JobControl& control, const std::function<bool(int32_t)>& on_token) {
  if (prompt.empty()) {
    throw UsageError("the prompt has no tokens",
                     "give some text: this model adds no BOS by itself");
  }
  const ModelConfig& config = model.config();
  const int64_t h = config.hidden_size, num_layers = config.num_layers();
  const auto prompt_tokens = static_cast<int64_t>(prompt.size());
  const int64_t capacity = prompt_tokens + options.max_new_tokens;
  LayerReader reader(model, {.prefetch = !plan.resident,
                             .keep_resident = plan.resident,
                             .kept_experts = options.kept_experts});
  AttentionBlock attention(config, pool);
  FeedForwardBlock feed_forward(config, pool);
  if (!options.skip_betas.empty()) feed_forward.SetSkipping(options.skip_betas);
  KeyValueCache cache(num_layers, config.num_kv_heads, config.head_dim, capacity);
  LoadedMatrix head;
  if (plan.resident) head = LoadRows(model, model.lm_head(), 0, config.vocab_size);
  const std::vector<float> norm = LoadVector(model, model.final_norm());
  AlignedBuffer<float> hidden(static_cast<size_t>(std::min(prompt_tokens, kPromptChunk) * h));
  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  const auto advance = [&](std::span<const int32_t> ids) {
    const auto n = static_cast<int64_t>(ids.size());
    LoadEmbeddings(model, ids, hidden.data());
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      control.Poll();
      const LayerWeights& weights = reader.Get(layer);
      attention.RunCached(weights, cache.length(), n, capacity, cache.layer(layer), hidden.data());
      feed_forward.Run(weights, {.layer = layer}, n, hidden.data());
    }
    cache.Advance(n);
  };
  const auto last_logits = [&](int64_t row) {
    const float* last = hidden.data() + row * h;
    if (!plan.resident) {
      ComputeLogits(model, pool, last, 1, logits.data());
      return;
    }
    std::vector<float> normed(static_cast<size_t>(h));
    RmsNorm(last, 1, h, h, norm.data(), config.rms_norm_eps, normed.data(), h);
    PackedRows packed;
    packed.Pack(normed.data(), 1, h, h, pool);
    MatMul(packed, head.matrix, logits.data(), config.vocab_size, pool);
  };

  GenerateResult result;
  auto start = std::chrono::steady_clock::now();
  int64_t rows = 0;
  for (int64_t first = 0; first < prompt_tokens; first += rows) {
    rows = std::min(kPromptChunk, prompt_tokens - first);
    advance(prompt.subspan(static_cast<size_t>(first), static_cast<size_t>(rows)));
  }
  result.prompt_seconds = Seconds(start);
  start = std::chrono::steady_clock::now();
  uint64_t state = options.sampling.seed;
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    last_logits(rows - 1);
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
    rows = 1;
    advance(std::span(&token, 1));
  }
  result.decode_seconds = Seconds(start);
  if (!options.skip_betas.empty()) result.skipping = feed_forward.skip_counts();
  return result;
}

}  // namespace winnow
