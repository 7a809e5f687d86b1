#include "eval/eval_sweep.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "forward/layer_sweep.h"
#include "forward/logits.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kScoreRows = 256;  // rows multiplied with a chunk of lm_head at once

// What is known of a target's row after some chunks of the vocabulary.
struct RunningScore {
  double log_sum = -std::numeric_limits<double>::infinity();  // of the exponentials so far
  float target = 0;                                           // logit of the id asked for
  float highest = -std::numeric_limits<float>::infinity();

  // Logits [rows] of ids from `first` on.
  void Add(const float* logits, int64_t rows, int64_t first, int32_t id) {
    const double part = LogSumExp(logits, rows);
    const double high = std::max(log_sum, part);
    log_sum = high + std::log(std::exp(log_sum - high) + std::exp(part - high));
    if (id >= first && id < first + rows) target = logits[id - first];
    highest = std::max(highest, Highest(logits, rows));
  }

 private:
  // Eight maxima side by side, which the compiler keeps in a register.
  static float Highest(const float* x, int64_t n) {
    std::array<float, 8> best;
    best.fill(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      for (size_t k = 0; k < 8; ++k) best[k] = std::max(best[k], x[i + static_cast<int64_t>(k)]);
    }
    for (; i < n; ++i) best[0] = std::max(best[0], x[i]);
    return *std::max_element(best.begin(), best.end());
  }
};

}  // namespace

EvalPlan PlanEval(const Model& model, const TokenSet& tokens, uint64_t bookkeeping_bytes,
                  const EvalOptions& options, int num_threads) {
  const int64_t h = model.config().hidden_size, n = tokens.num_tokens();
  EvalPlan plan;
  for (const auto& [prefetch, spill] :
       {std::pair{true, false}, {false, false}, {true, true}, {false, true}}) {
    plan.prefetch = prefetch;
    plan.spill = spill;
    plan.memory = MemoryPlan{};
    plan.memory.Add("program", kProgramBytes);
    const LayerReaderOptions reading{.prefetch = prefetch, .kept_experts = options.kept_experts};
    const int64_t tile = LargestTile(tokens);
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
    plan.memory.Add("token ids and scores",
                    static_cast<uint64_t>(n) * sizeof(int32_t) + bookkeeping_bytes);
    plan.memory.Add("work of a tile", LayerSweep::ScratchBytes(model, tokens, false, num_threads));
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

SweptStates SweepLayers(const Model& model, const TokenSet& tokens, const EvalOptions& options,
                        const EvalPlan& plan, ThreadPool& pool, const JobControl& control) {
  const std::string name = fmt::format(".winnow-eval-{}.spill", ::getpid());
  SweptStates swept;
  swept.states = MakeStream(tokens, model.config().hidden_size,
                            plan.spill ? options.spill_folder / name : fs::path());
  LayerReader reader(model, {.prefetch = plan.prefetch, .kept_experts = options.kept_experts});
  LayerSweep sweep(model, tokens, pool, control, "eval", options.compute);
  if (!options.skip_betas.empty()) sweep.SetSkipping(options.skip_betas);
  sweep.Embed(*swept.states);
  for (int64_t layer = 0; layer < model.config().num_layers(); ++layer) {
    sweep.RunLayer(layer, reader.Get(layer), *swept.states, nullptr);
  }
  if (!options.skip_betas.empty()) swept.skipping = sweep.skip_counts();
  return swept;
}

void RequireIdsInVocabulary(const Model& model, std::span<const int32_t> ids) {
  for (const int32_t id : ids) {
    if (id >= model.config().vocab_size) {
      throw UsageError(fmt::format("token id {} is outside the model's vocabulary of {}", id,
                                   model.config().vocab_size),
                       "the ids were made with another tokenizer");
    }
  }
}

std::vector<TokenScore> ScoreTargets(const Model& model, const TokenSet& tokens,
                                     std::span<const TokenTarget> targets, HiddenStates& states,
                                     ThreadPool& pool, const JobControl& control) {
  const int64_t h = model.config().hidden_size, vocabulary = model.config().vocab_size;
  const std::vector<float> norm = LoadVector(model, model.final_norm());
  std::vector<RunningScore> running(targets.size());
  AlignedBuffer<float> normed(static_cast<size_t>(kScoreRows * h));
  AlignedBuffer<float> logits(
      static_cast<size_t>(kScoreRows * std::min(vocabulary, kVocabularyChunk)));
  PackedRows packed;
  const std::vector<SequenceTile> tiles = SplitIntoTiles(tokens, kTileTokens);
  for (int64_t first = 0; first < vocabulary; first += kVocabularyChunk) {
    const int64_t rows = std::min(kVocabularyChunk, vocabulary - first);
    const LoadedMatrix head = LoadRows(model, model.lm_head(), first, rows);
    size_t next = 0;  // target
    for (const SequenceTile& tile : tiles) {
      const int64_t tile_end = tile.first_token + tile.num_tokens;
      if (next == targets.size() || targets[next].position >= tile_end) continue;
      const float* hidden = states.Load(tile.first_token, tile.num_tokens);
      while (next < targets.size() && targets[next].position < tile_end) {
        control.Poll();
        const size_t begin = next;
        for (; next < targets.size() && targets[next].position < tile_end &&
               next - begin < static_cast<size_t>(kScoreRows);
             ++next) {
          RmsNorm(hidden + (targets[next].position - tile.first_token) * h, 1, h, h, norm.data(),
                  model.config().rms_norm_eps,
                  normed.data() + static_cast<int64_t>(next - begin) * h, h);
        }
        const auto count = static_cast<int64_t>(next - begin);
        packed.Pack(normed.data(), count, h, h, pool);
        MatMul(packed, head.matrix, logits.data(), rows, pool);
        pool.Run(count, [&](int64_t i, int) {
          const size_t at = begin + static_cast<size_t>(i);
          running[at].Add(logits.data() + i * rows, rows, first, targets[at].id);
        });
      }
    }
  }
  std::vector<TokenScore> scores;
  scores.reserve(running.size());
  for (const RunningScore& score : running) {
    scores.push_back(
        {static_cast<double>(score.target) - score.log_sum, score.target >= score.highest});
  }
  return scores;
}

}  // namespace winnow
