#include "condense/layer_search.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "forward/layer_sweep.h"
#include "forward/logits.h"
#include "kernels/divergence.h"
#include "kernels/elementwise.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kRows = 64;        // a task of row-wise work
constexpr int64_t kScoreRows = 256;  // tokens multiplied with a chunk of lm_head at once
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Searcher {
 public:
  Searcher(const Model& model, const TokenSet& tokens, const CondenseWeights& condense,
           const LayerSearchOptions& options, const LayerSearchPlan& plan, ThreadPool& pool,
           const JobControl& control)
      : model_(model),
        tokens_(tokens),
        condense_(condense),
        options_(options),
        plan_(plan),
        pool_(pool),
        control_(control),
        moe_(model.config().MoeLayers()),
        reader_(model, {.prefetch = plan.prefetch, .keep_resident = plan.resident}),
        norm_(LoadVector(model, model.final_norm())),
        entry_(moe_.size()),
        candidate_(moe_.size()) {
    for (size_t m = 0; m < moe_.size(); ++m) left_.push_back(static_cast<int32_t>(m));
  }

  std::vector<GreedyStep> Greedy() {
    std::vector<GreedyStep> steps;
    while (std::ssize(steps) < options_.num_layers && !left_.empty()) {
      Sweep(fmt::format("layer search, step {} of {}", steps.size() + 1, options_.num_layers));
      if (steps.empty()) KeepIntact();
      GreedyStep step;
      size_t best = 0;
      for (size_t i = 0; i < left_.size(); ++i) {
        step.candidates.push_back(Divergence(*candidate_[static_cast<size_t>(left_[i])]));
        candidate_[static_cast<size_t>(left_[i])].reset();
        if (step.candidates.back() < step.candidates[best]) best = i;
      }
      step.chosen = left_[best];
      step.divergence = step.candidates[best];
      last_chosen_ = step.chosen;
      chosen_.push_back(step.chosen);
      left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(best));
      steps.push_back(std::move(step));
    }
    return steps;
  }

  std::vector<double> Single() {
    Sweep("layer search, each layer alone");
    return KlOfLogits();
  }

 private:
  std::unique_ptr<HiddenStates> MakeStream() {
    const std::string name = fmt::format(".winnow-layers-{}.spill", ::getpid());
    return winnow::MakeStream(tokens_, model_.config().hidden_size,
                              plan_.spill ? options_.spill_folder / name : fs::path());
  }
  std::unique_ptr<HiddenStates> Copy(HiddenStates& from) {
    auto to = MakeStream();
    for (const SequenceTile& tile : SplitIntoTiles(tokens_, kTileTokens)) {
      const float* rows = from.Load(tile.first_token, tile.num_tokens);
      std::memcpy(
          to->Load(tile.first_token, tile.num_tokens), rows,
          static_cast<size_t>(tile.num_tokens * model_.config().hidden_size) * sizeof(float));
      to->Store(tile.first_token, tile.num_tokens);
    }
    return to;
  }
  bool IsLeft(int64_t m) const { return std::find(left_.begin(), left_.end(), m) != left_.end(); }
  bool IsChosen(int64_t m) const {
    return std::find(chosen_.begin(), chosen_.end(), m) != chosen_.end();
  }

  // One pass up the layers: the stream of what is chosen so far, from where it changed, and every
  // candidate from its own layer. Leaves the candidates' final states in candidate_ and, the first
  // time, the intact model's in base_.
  void Sweep(const std::string& stage) {
    const int64_t num_layers = model_.config().num_layers(), n = tokens_.num_tokens();
    const bool first = chosen_.empty();
    const int64_t from = first ? 0
                               : std::min(moe_[static_cast<size_t>(last_chosen_)],
                                          moe_[static_cast<size_t>(left_.front())]);
    LayerSweep sweep(model_, tokens_, pool_, control_, stage, options_.compute);
    int64_t runs = first ? num_layers : 0;
    for (const int32_t m : left_) runs += num_layers - moe_[static_cast<size_t>(m)];
    if (!first &&
        moe_[static_cast<size_t>(left_.back())] > moe_[static_cast<size_t>(last_chosen_)]) {
      runs += moe_[static_cast<size_t>(left_.back())] - moe_[static_cast<size_t>(last_chosen_)];
    }
    sweep.SetWork(0, runs * n);
    base_.reset();
    if (first) {
      base_ = MakeStream();
      sweep.Embed(*base_);
    }
    for (int64_t layer = from; layer < num_layers; ++layer) {
      const LayerWeights& weights = reader_.Get(layer);
      const auto at = std::find(moe_.begin(), moe_.end(), layer);
      const int64_t m = at == moe_.end() ? -1 : at - moe_.begin();
      const bool left = m >= 0 && IsLeft(m), chosen = m >= 0 && IsChosen(m);
      CondensedWeights condensed;
      if (left || chosen) condensed = condense_(m, weights);
      const LayerWeights& here = chosen ? condensed.weights : weights;
      if (!first && m == last_chosen_) {
        base_ = std::move(entry_[static_cast<size_t>(m)]);
      }
      if (base_ != nullptr) {
        if (left) entry_[static_cast<size_t>(m)] = Copy(*base_);
        // Above the last candidate only the intact model's final state is of use.
        if (!first && layer >= moe_[static_cast<size_t>(left_.back())]) {
          base_.reset();
        } else {
          sweep.RunLayer(layer, here, *base_, nullptr);
        }
      }
      for (const std::unique_ptr<HiddenStates>& stream : candidate_) {
        if (stream != nullptr) sweep.RunLayer(layer, here, *stream, nullptr);
      }
      if (left) {
        auto& stream = candidate_[static_cast<size_t>(m)];
        stream = Copy(*entry_[static_cast<size_t>(m)]);
        sweep.RunLayer(layer, condensed.weights, *stream, nullptr);
      }
    }
  }

  // The intact final state as probabilities.
  void KeepIntact() {
    const int64_t h = model_.config().hidden_size;
    for (const SequenceTile& tile : SplitIntoTiles(tokens_, kTileTokens)) {
      float* rows = base_->Load(tile.first_token, tile.num_tokens);
      pool_.Run((tile.num_tokens + kRows - 1) / kRows, [&](int64_t task, int) {
        const int64_t begin = task * kRows, count = std::min(kRows, tile.num_tokens - begin);
        RmsNorm(rows + begin * h, count, h, h, norm_.data(), model_.config().rms_norm_eps,
                rows + begin * h, h);
        Softmax(rows + begin * h, count, h, h);
      });
      base_->Store(tile.first_token, tile.num_tokens);
    }
    intact_ = std::move(base_);
  }

  double Divergence(HiddenStates& states) {
    const int64_t h = model_.config().hidden_size;
    std::vector<double> divergence(static_cast<size_t>(tokens_.num_tokens()));
    AlignedBuffer<float> scratch(static_cast<size_t>(pool_.num_threads()) * static_cast<size_t>(h));
    for (const SequenceTile& tile : SplitIntoTiles(tokens_, kTileTokens)) {
      control_.Poll();
      const float* p = intact_->Load(tile.first_token, tile.num_tokens);
      const float* rows = states.Load(tile.first_token, tile.num_tokens);
      pool_.Run((tile.num_tokens + kRows - 1) / kRows, [&](int64_t task, int worker) {
        const int64_t begin = task * kRows, count = std::min(kRows, tile.num_tokens - begin);
        JensenShannon(p + begin * h,
                      {.base = rows + begin * h,
                       .norm_weight = norm_.data(),
                       .norm_eps = model_.config().rms_norm_eps},
                      count, h, scratch.data() + worker * h,
                      divergence.data() + tile.first_token + begin, 1);
      });
    }
    return MeanOverDocuments(divergence, 1, tokens_.offsets);
  }

  // Logits of `count` rows of a stream against a part of lm_head.
  void Logits(const float* rows, int64_t count, const WeightMatrix& head, float* logits) {
    const int64_t h = model_.config().hidden_size;
    normed_.resize(static_cast<size_t>(count * h));
    RmsNorm(rows, count, h, h, norm_.data(), model_.config().rms_norm_eps, normed_.data(), h);
    packed_.Pack(normed_.data(), count, h, h, pool_);
    MatMul(packed_, head, logits, head.rows, pool_);
  }

  // KL(p || q) = sum p (lp - lq) + log Z_q - log Z_p with logits lp, lq, gathered over chunks of
  // the vocabulary: lm_head is read once.
  std::vector<double> KlOfLogits() {
    const int64_t h = model_.config().hidden_size, vocabulary = model_.config().vocab_size;
    const auto n = static_cast<size_t>(tokens_.num_tokens());
    const size_t candidates = left_.size();
    struct Sums {
      double largest = -kInfinity, sum = 0;  // of the intact logits
    };
    std::vector<Sums> intact(n);
    std::vector<double> cross(n * candidates), log_sum(n * candidates, -kInfinity);
    const int64_t chunk = std::min(vocabulary, kVocabularyChunk);
    AlignedBuffer<float> lp(static_cast<size_t>(kScoreRows * chunk));
    AlignedBuffer<float> lq(static_cast<size_t>(kScoreRows * chunk));
    AlignedBuffer<float> rows_of(static_cast<size_t>(kScoreRows * h));
    for (int64_t first = 0; first < vocabulary; first += kVocabularyChunk) {
      const int64_t width = std::min(kVocabularyChunk, vocabulary - first);
      const LoadedMatrix head = LoadRows(model_, model_.lm_head(), first, width);
      for (const SequenceTile& tile : SplitIntoTiles(tokens_, kTileTokens)) {
        const float* base = base_->Load(tile.first_token, tile.num_tokens);
        std::vector<const float*> streams;
        for (const int32_t m : left_) {
          streams.push_back(
              candidate_[static_cast<size_t>(m)]->Load(tile.first_token, tile.num_tokens));
        }
        for (int64_t begin = 0; begin < tile.num_tokens; begin += kScoreRows) {
          control_.Poll();
          const int64_t count = std::min(kScoreRows, tile.num_tokens - begin);
          const int64_t token = tile.first_token + begin;
          Logits(base + begin * h, count, head.matrix, lp.data());
          std::vector<double> scale(static_cast<size_t>(count));
          pool_.Run(count, [&](int64_t i, int) {
            Sums& sums = intact[static_cast<size_t>(token + i)];
            const float* row = lp.data() + i * width;
            const double largest =
                std::max(sums.largest, static_cast<double>(*std::max_element(row, row + width)));
            scale[static_cast<size_t>(i)] = std::exp(sums.largest - largest);
            sums = {largest, sums.sum * scale[static_cast<size_t>(i)]};
          });
          for (size_t c = 0; c < candidates; ++c) {
            Logits(streams[c] + begin * h, count, head.matrix, lq.data());
            pool_.Run(count, [&](int64_t i, int) {
              const auto at = static_cast<size_t>(token + i) * candidates + c;
              Sums& sums = intact[static_cast<size_t>(token + i)];
              const float *p = lp.data() + i * width, *q = lq.data() + i * width;
              double part = 0, mass = 0;
              for (int64_t v = 0; v < width; ++v) {
                const double weight = std::exp(static_cast<double>(p[v]) - sums.largest);
                mass += weight;
                part += weight * (static_cast<double>(p[v]) - static_cast<double>(q[v]));
              }
              cross[at] = cross[at] * scale[static_cast<size_t>(i)] + part;
              if (c + 1 == candidates) sums.sum += mass;
              const double log_part = LogSumExp(q, width);
              const double high = std::max(log_sum[at], log_part);
              log_sum[at] =
                  high + std::log(std::exp(log_sum[at] - high) + std::exp(log_part - high));
            });
          }
        }
      }
    }
    std::vector<double> kl;
    for (size_t c = 0; c < candidates; ++c) {
      double total = 0;
      for (size_t t = 0; t < n; ++t) {
        const Sums& sums = intact[t];
        total += cross[t * candidates + c] / sums.sum + log_sum[t * candidates + c] -
                 (sums.largest + std::log(sums.sum));
      }
      kl.push_back(total / static_cast<double>(n));
    }
    return kl;
  }

  const Model& model_;
  const TokenSet& tokens_;
  const CondenseWeights& condense_;
  const LayerSearchOptions& options_;
  const LayerSearchPlan& plan_;
  ThreadPool& pool_;
  const JobControl& control_;
  const std::vector<int32_t> moe_;
  LayerReader reader_;
  const std::vector<float> norm_;
  std::vector<int32_t> left_, chosen_;  // MoE layers
  int64_t last_chosen_ = -1;
  // The state before each layer that is left, what the chosen ones make of it; the candidates'
  // streams; the stream of the chosen ones; the intact final state.
  std::vector<std::unique_ptr<HiddenStates>> entry_, candidate_;
  std::unique_ptr<HiddenStates> base_, intact_;
  std::vector<float> normed_;
  PackedRows packed_;
};

}  // namespace

LayerSearchPlan PlanLayerSearch(const Model& model, const TokenSet& tokens,
                                const LayerSearchOptions& options, int num_threads) {
  const int64_t h = model.config().hidden_size, n = tokens.num_tokens();
  const auto streams = static_cast<uint64_t>(2 * model.config().MoeLayers().size() + 2);
  const int64_t tile = LargestTile(tokens);
  const int64_t chunk = std::min(kVocabularyChunk, model.config().vocab_size);
  LayerSearchPlan plan;
  struct Way {
    bool resident, prefetch, spill;
  };
  for (const Way& way : {Way{true, false, false}, Way{false, true, false}, Way{false, false, false},
                         Way{false, true, true}, Way{false, false, true}}) {
    plan.resident = way.resident;
    plan.prefetch = way.prefetch;
    plan.spill = way.spill;
    plan.memory = {};
    plan.memory.Add("program", kProgramBytes);
    const LayerReaderOptions reading{.prefetch = way.prefetch, .keep_resident = way.resident};
    const uint64_t layer = LayerReader::LargestLayerBytes(model, reading);
    plan.memory.Add(way.resident
                        ? "weights of all layers"
                        : (way.prefetch ? "weights of two layers" : "weights of one layer"),
                    way.resident ? LayerReader::AllLayersBytes(model, reading)
                                 : layer * (way.prefetch ? 2 : 1));
    plan.memory.Add("a condensed layer", layer);
    plan.memory.Add(way.spill ? "streams of candidates, a tile each (the rest on disk)"
                              : "streams of candidates",
                    streams * HiddenStates::Bytes(way.spill ? tile : n, h));
    plan.memory.Add(
        "part of lm_head and its logits",
        HiddenStates::Bytes(chunk, h) + HiddenStates::Bytes(kScoreRows, 2 * chunk + 2 * h));
    plan.memory.Add("sums of tokens", static_cast<uint64_t>(n) * (8 * streams + 32));
    plan.memory.Add("work of a tile", LayerSweep::ScratchBytes(model, tokens, false, num_threads));
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

std::vector<GreedyStep> SearchLayersGreedily(const Model& model, const TokenSet& tokens,
                                             const CondenseWeights& condense,
                                             const LayerSearchOptions& options,
                                             const LayerSearchPlan& plan, ThreadPool& pool,
                                             const JobControl& control) {
  return Searcher(model, tokens, condense, options, plan, pool, control).Greedy();
}

std::vector<double> SingleLayerKl(const Model& model, const TokenSet& tokens,
                                  const CondenseWeights& condense,
                                  const LayerSearchOptions& options, const LayerSearchPlan& plan,
                                  ThreadPool& pool, const JobControl& control) {
  return Searcher(model, tokens, condense, options, plan, pool, control).Single();
}

}  // namespace winnow
