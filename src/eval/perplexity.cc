#include "eval/perplexity.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "base/error.h"
#include "forward/layer_sweep.h"
#include "forward/logits.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kScoreRows = 256;  // tokens multiplied with a chunk of lm_head at once

// Negative log-likelihood of each target. lm_head is read once, chunk by chunk; each token carries
// a running maximum and sum of exponentials in double across chunks.
std::vector<double> ScoreTokens(const Model& model, const ScoredWindows& windows,
                                HiddenStates& states, ThreadPool& pool, const JobControl& control) {
  const int64_t h = model.config().hidden_size, vocabulary = model.config().vocab_size;
  const int64_t n = windows.inputs.num_tokens();
  const std::vector<float> norm = LoadVector(model, model.final_norm());
  std::vector<double> log_sum(static_cast<size_t>(n), -kInfinity),
      target(static_cast<size_t>(n), 0);
  AlignedBuffer<float> normed(static_cast<size_t>(kScoreRows * h));
  AlignedBuffer<float> logits(
      static_cast<size_t>(kScoreRows * std::min(vocabulary, kVocabularyChunk)));
  PackedRows packed;
  const std::vector<SequenceTile> tiles = SplitIntoTiles(windows.inputs, kTileTokens);
  for (int64_t first = 0; first < vocabulary; first += kVocabularyChunk) {
    const int64_t rows = std::min(kVocabularyChunk, vocabulary - first);
    const LoadedMatrix head = LoadRows(model, model.lm_head(), first, rows);
    for (const SequenceTile& tile : tiles) {
      const float* hidden = states.Load(tile.first_token, tile.num_tokens);
      for (int64_t begin = 0; begin < tile.num_tokens; begin += kScoreRows) {
        control.Poll();
        const int64_t count = std::min(kScoreRows, tile.num_tokens - begin);
        RmsNorm(hidden + begin * h, count, h, h, norm.data(), model.config().rms_norm_eps,
                normed.data(), h);
        packed.Pack(normed.data(), count, h, h, pool);
        MatMul(packed, head.matrix, logits.data(), rows, pool);
        pool.Run(count, [&](int64_t i, int) {
          const auto at = static_cast<size_t>(tile.first_token + begin + i);
          const int32_t id = windows.targets[at];
          if (id < 0) return;
          const float* row = logits.data() + i * rows;
          const double part = LogSumExp(row, rows);
          const double high = std::max(log_sum[at], part);
          log_sum[at] = high + std::log(std::exp(log_sum[at] - high) + std::exp(part - high));
          if (id >= first && id < first + rows) target[at] = static_cast<double>(row[id - first]);
        });
      }
    }
  }
  for (size_t i = 0; i < log_sum.size(); ++i) log_sum[i] -= target[i];
  return log_sum;
}

}  // namespace

EvalPlan PlanPerplexity(const Model& model, const ScoredWindows& windows,
                        const EvalOptions& options, int num_threads) {
  const int64_t h = model.config().hidden_size, n = windows.inputs.num_tokens();
  EvalPlan plan;
  for (const auto& [prefetch, spill] :
       {std::pair{true, false}, {false, false}, {true, true}, {false, true}}) {
    plan.prefetch = prefetch;
    plan.spill = spill;
    plan.memory = MemoryPlan{};
    plan.memory.Add("program", kProgramBytes);
    const LayerReaderOptions reading{.prefetch = prefetch, .kept_experts = options.kept_experts};
    const int64_t tile = LargestTile(windows.inputs);
    const uint64_t layers = LayerReader::LargestLayerBytes(model, reading) * (prefetch ? 2 : 1);
    const int64_t chunk = std::min(kVocabularyChunk, model.config().vocab_size);
    const uint64_t head =
        HiddenStates::Bytes(chunk, h) + HiddenStates::Bytes(kScoreRows, chunk + 2 * h);
    // The layers are gone when lm_head comes.
    plan.memory.Add(
        prefetch ? "weights of two layers, then of lm_head" : "weights of a layer, then of lm_head",
        std::max(layers, head));
    plan.memory.Add(
        spill ? "hidden states, one tile (the rest on disk)" : "hidden states of all tokens",
        HiddenStates::Bytes(spill ? tile : n, h));
    plan.memory.Add("token ids and scores", static_cast<uint64_t>(n) * 32);
    plan.memory.Add("work of a tile",
                    LayerSweep::ScratchBytes(model, windows.inputs, false, num_threads));
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

PerplexityResult RunPerplexity(const Model& model, const ScoredWindows& windows,
                               const EvalOptions& options, const EvalPlan& plan, ThreadPool& pool,
                               const JobControl& control) {
  for (const int32_t id : windows.targets) {
    if (id >= model.config().vocab_size) {
      throw UsageError(fmt::format("token id {} is outside the model's vocabulary of {}", id,
                                   model.config().vocab_size),
                       "the ids were made with another tokenizer");
    }
  }
  const std::string name = fmt::format(".winnow-eval-{}.spill", ::getpid());
  const std::unique_ptr<HiddenStates> states =
      MakeStream(windows.inputs, model.config().hidden_size,
                 plan.spill ? options.spill_folder / name : fs::path());
  std::optional<SkipCounts> skipping;
  {
    LayerReader reader(model, {.prefetch = plan.prefetch, .kept_experts = options.kept_experts});
    LayerSweep sweep(model, windows.inputs, pool, control, "eval", options.compute);
    if (!options.skip_betas.empty()) sweep.SetSkipping(options.skip_betas);
    sweep.Embed(*states);
    for (int64_t layer = 0; layer < model.config().num_layers(); ++layer) {
      sweep.RunLayer(layer, reader.Get(layer), *states, nullptr);
    }
    if (!options.skip_betas.empty()) skipping = sweep.skip_counts();
  }
  PerplexityResult result = ScoreStates(model, windows, *states, pool, control);
  result.skipping = std::move(skipping);
  return result;
}

PerplexityResult ScoreStates(const Model& model, const ScoredWindows& windows, HiddenStates& states,
                             ThreadPool& pool, const JobControl& control) {
  const std::vector<double> scores = ScoreTokens(model, windows, states, pool, control);
  std::vector<double> window_nll;
  std::vector<int64_t> window_tokens;
  for (int64_t w = 0; w < windows.inputs.num_sequences(); ++w) {
    double sum = 0;
    int64_t tokens = 0;
    for (int64_t t = windows.inputs.offsets[static_cast<size_t>(w)];
         t < windows.inputs.offsets[static_cast<size_t>(w) + 1]; ++t) {
      if (windows.targets[static_cast<size_t>(t)] < 0) continue;
      const double score = scores[static_cast<size_t>(t)];
      if (!std::isfinite(score)) {
        throw ModelError(fmt::format("the model's logits are not finite (window {}, position {})",
                                     w, t - windows.inputs.offsets[static_cast<size_t>(w)]),
                         "the weights may hold NaN or Inf: see winnow doctor MODEL");
      }
      sum += score;
      ++tokens;
    }
    window_nll.push_back(sum);
    window_tokens.push_back(tokens);
  }
  return Summarize(window_nll, window_tokens, windows.bytes);
}

PerplexityResult Summarize(std::span<const double> window_nll,
                           std::span<const int64_t> window_tokens, uint64_t bytes) {
  PerplexityResult result;
  result.window_nll.assign(window_nll.begin(), window_nll.end());
  result.window_tokens.assign(window_tokens.begin(), window_tokens.end());
  double total = 0;
  for (size_t w = 0; w < window_nll.size(); ++w) {
    total += window_nll[w];
    result.tokens += window_tokens[w];
  }
  result.nll = total / static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.nll);
  if (bytes > 0) result.bits_per_byte = total / std::log(2.0) / static_cast<double>(bytes);
  const auto count = static_cast<double>(window_nll.size());
  if (window_nll.size() > 1) {
    double squares = 0;
    for (size_t w = 0; w < window_nll.size(); ++w) {
      const double mean = window_nll[w] / static_cast<double>(window_tokens[w]);
      squares += (mean - result.nll) * (mean - result.nll);
    }
    result.standard_error = std::sqrt(squares / (count - 1) / count);
  }
  return result;
}

PairedDifference Compare(const PerplexityResult& a, const PerplexityResult& b) {
  PairedDifference difference;
  difference.nll = b.nll - a.nll;
  const auto count = static_cast<double>(a.window_nll.size());
  if (a.window_nll.size() < 2) return difference;
  double squares = 0;
  for (size_t w = 0; w < a.window_nll.size(); ++w) {
    const double d = (b.window_nll[w] - a.window_nll[w]) / static_cast<double>(a.window_tokens[w]) -
                     difference.nll;
    squares += d * d;
  }
  difference.standard_error = std::sqrt(squares / (count - 1) / count);
  return difference;
}

}  // namespace winnow
