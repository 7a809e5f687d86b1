#include "condense/neuron_pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/aligned_buffer.h"
#include "condense/condense_run.h"
#include "condense/feature_moments.h"
#include "condense/neuron_choice.h"
#include "condense/routing_sums.h"
#include "kernels/accumulate.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"

namespace winnow {
namespace {

constexpr int64_t kRows = 1024;  // tokens whose features are held at once
// Candidates for each neuron that is chosen at most, if not all are: cost 1 to 5 % of the loss's
// increase where all could be compared.
constexpr int64_t kCandidatesOfOne = 3;

// Features of the shared expert that can be a part of the same SwiGLU: without a gate of its own.
int64_t ForcedFeatures(const ModelConfig& config, const LayerConfig& layer) {
  return config.shared_expert_gated ? 0 : layer.shared_width;
}

// What the tokens of a tile see and put out: input, the output to be replaced, and on request that
// of every expert.
class TileCapture : public MoeObserver {
 public:
  TileCapture(int64_t hidden, bool whole_output, bool experts)
      : hidden_(hidden), whole_output_(whole_output), experts_(experts) {}
  bool WantsExpertOutputs() const override { return experts_; }
  void Start(int64_t first_token, int64_t num_tokens) {
    first_ = first_token;
    input.resize(static_cast<size_t>(num_tokens * hidden_));
    output.resize(static_cast<size_t>(num_tokens * hidden_));
  }
  void OnTokens(const MoeTokens& m) override {
    const int64_t at = (m.first_token - first_) * hidden_;
    const auto bytes = static_cast<size_t>(m.num_tokens * hidden_) * sizeof(float);
    std::memcpy(input.data() + at, m.input, bytes);
    std::memcpy(output.data() + at, whole_output_ ? m.output : m.routed, bytes);
    if (!experts_) return;
    // Sums over tokens of products of expert outputs, relative to the stream behind the layer.
    const int64_t e = m.num_experts, pairs = e * (e + 1) / 2;
    gram.resize(static_cast<size_t>(pairs));
    cross.resize(static_cast<size_t>(e));
    std::vector<float> row(static_cast<size_t>(pairs)), dots(static_cast<size_t>(e));
    for (int64_t t = 0; t < m.num_tokens; ++t) {
      const float* f = m.expert_outputs + t * e * hidden_;
      const float* z = m.routed + t * hidden_;
      double stream = 0;
      for (int64_t i = 0; i < hidden_; ++i) {
        const double v = static_cast<double>(m.residual[t * hidden_ + i]) +
                         static_cast<double>(m.output[t * hidden_ + i]);
        stream += v * v;
      }
      const double weight = stream > 0 ? static_cast<double>(hidden_) / stream : 0;
      GramUpper(f, e, hidden_, hidden_, row.data());
      AccumulateDouble(gram.data(), weight, row.data(), pairs);
      for (int64_t i = 0; i < e; ++i) {
        dots[static_cast<size_t>(i)] = Dot(f + i * hidden_, z, hidden_);
      }
      AccumulateDouble(cross.data(), weight, dots.data(), e);
      square += weight * static_cast<double>(Dot(z, z, hidden_));
    }
  }
  std::vector<float> input, output;
  std::vector<double> gram, cross;  // upper triangle by rows
  double square = 0;

 private:
  int64_t hidden_;
  bool whole_output_, experts_;
  int64_t first_ = 0;
};

// What the tokens of a tile see, and what the router gave each expert over all tiles.
class RoutingCapture : public MoeObserver {
 public:
  RoutingCapture(int64_t hidden, int64_t num_experts) : routing(num_experts), hidden_(hidden) {}
  void Start(int64_t first_token, int64_t num_tokens) {
    first_ = first_token;
    input.resize(static_cast<size_t>(num_tokens * hidden_));
  }
  void OnTokens(const MoeTokens& m) override {
    std::memcpy(input.data() + (m.first_token - first_) * hidden_, m.input,
                static_cast<size_t>(m.num_tokens * hidden_) * sizeof(float));
    routing.OnTokens(m);
  }
  std::vector<float> input;
  RoutingSums routing;

 private:
  int64_t hidden_;
  int64_t first_ = 0;
};

// Gate and up projections of some neurons: whole experts one after the other if they are all, else
// a copy of their rows in f32.
class ChosenNeurons {
 public:
  ChosenNeurons(const LayerWeights& weights, const std::vector<int64_t>& neurons, int64_t width)
      : weights_(weights), width_(width) {
    if (std::ssize(neurons) == weights.num_experts() * width) return;
    const auto gather = [&](WeightMatrix FeedForwardWeights::*matrix, WeightMatrix& to,
                            AlignedBuffer<float>& storage) {
      const int64_t cols = (weights.experts[0].*matrix).cols;
      storage = AlignedBuffer<float>(neurons.size() * static_cast<size_t>(cols));
      for (size_t i = 0; i < neurons.size(); ++i) {
        WidenRow(weights.experts[static_cast<size_t>(neurons[i] / width)].*matrix,
                 neurons[i] % width, storage.data() + static_cast<int64_t>(i) * cols);
      }
      to = {static_cast<const std::byte*>(static_cast<const void*>(storage.data())),
            std::ssize(neurons), cols, Dtype::kF32};
    };
    gather(&FeedForwardWeights::gate, some_.gate, gate_);
    gather(&FeedForwardWeights::up, some_.up, up_);
  }

  void Run(LayerSweep& sweep, const float* x, int64_t n, float* inner, int64_t ld) const {
    if (!some_.gate.empty()) return sweep.RunInner(some_, x, n, inner, ld);
    for (size_t e = 0; e < weights_.experts.size(); ++e) {
      sweep.RunInner(weights_.experts[e], x, n, inner + static_cast<int64_t>(e) * width_, ld);
    }
  }

 private:
  const LayerWeights& weights_;
  int64_t width_;
  FeedForwardWeights some_;
  AlignedBuffer<float> gate_, up_;
};

// What each token counts: hidden over the square of the stream behind the layer.
void TokenWeights(const float* after, int64_t n, int64_t hidden, float* weight) {
  for (int64_t t = 0; t < n; ++t) {
    double norm = 0;
    for (int64_t i = 0; i < hidden; ++i) {
      const auto v = static_cast<double>(after[t * hidden + i]);
      norm += v * v;
    }
    weight[t] = norm > 0 ? static_cast<float>(static_cast<double>(hidden) / norm) : 0.0f;
  }
}

class LayerPass {
 public:
  LayerPass(const Model& model, int64_t layer, const LayerWeights& weights, const NeuronWidth& most,
            LayerSweep& sweep, HiddenStates& stream, ThreadPool& pool, const JobControl& control)
      : config_(model.config()),
        layer_config_(config_.layers[static_cast<size_t>(layer)]),
        layer_(layer),
        weights_(weights),
        max_width_(most.width),
        num_candidates_(CandidateNeurons(config_, layer_config_, most.width, most.most_neurons)),
        sweep_(sweep),
        stream_(stream),
        pool_(pool),
        control_(control) {}

  CondenseLayer Run() {
    result_.layer = static_cast<int32_t>(layer_);
    result_.num_experts = weights_.num_experts();
    if (num_candidates_ > 0) {
      Neurons();
    } else {
      Experts();
    }
    // Relative to the stream behind the layer: each token's weight makes that hidden_size.
    for (std::vector<double>* errors : {&result_.width_errors, &result_.width_fold_errors}) {
      for (double& error : *errors) {
        error /= static_cast<double>(tokens_) * static_cast<double>(config_.hidden_size);
      }
    }
    return std::move(result_);
  }

 private:
  // The layer itself, tile by tile; body(tile, capture) after each.
  template <class Body>
  void ForTiles(TileCapture& capture, const Body& body) {
    for (const SequenceTile& tile : sweep_.tiles()) {
      capture.Start(tile.first_token, tile.num_tokens);
      float* hidden = stream_.Load(tile.first_token, tile.num_tokens);
      sweep_.RunAttention(weights_, tile, hidden);
      sweep_.RunFeedForward(
          weights_, {.layer = layer_, .first_token = tile.first_token, .observer = &capture},
          tile.num_tokens, hidden);
      body(tile, hidden);
      stream_.Store(tile.first_token, tile.num_tokens);
      sweep_.Advance(layer_, tile.num_tokens);
      tokens_ += tile.num_tokens;
    }
  }

  // Neurons of all experts, numbered expert by expert, that are considered; ascending. If not all:
  // those of most energy in what the layer puts out, the mean of activation^2 times (mean routing
  // weight)^2 times the square of the column of the down projection.
  std::vector<int64_t> Candidates() {
    const int64_t width = layer_config_.expert_width, experts = weights_.num_experts();
    std::vector<int64_t> neurons(static_cast<size_t>(experts * width));
    std::iota(neurons.begin(), neurons.end(), int64_t{0});
    if (num_candidates_ == std::ssize(neurons)) return neurons;
    const std::vector<double> energy = Energies();
    std::stable_sort(neurons.begin(), neurons.end(), [&](int64_t a, int64_t b) {
      return energy[static_cast<size_t>(a)] > energy[static_cast<size_t>(b)];
    });
    neurons.resize(static_cast<size_t>(num_candidates_));
    std::sort(neurons.begin(), neurons.end());
    return neurons;
  }

  std::vector<double> Energies() {
    const int64_t h = config_.hidden_size, width = layer_config_.expert_width;
    const int64_t experts = weights_.num_experts();
    std::vector<double> energy(static_cast<size_t>(experts * width));
    RoutingCapture capture(h, experts);
    std::vector<float> hidden, weight(kRows), inner(static_cast<size_t>(kRows * width));
    for (const SequenceTile& tile : sweep_.tiles()) {
      capture.Start(tile.first_token, tile.num_tokens);
      // The stream goes through the layer later.
      const float* stream = stream_.Load(tile.first_token, tile.num_tokens);
      hidden.assign(stream, stream + tile.num_tokens * h);
      sweep_.RunAttention(weights_, tile, hidden.data());
      sweep_.RunFeedForward(
          weights_, {.layer = layer_, .first_token = tile.first_token, .observer = &capture},
          tile.num_tokens, hidden.data());
      for (int64_t first = 0; first < tile.num_tokens; first += kRows) {
        const int64_t n = std::min(kRows, tile.num_tokens - first);
        TokenWeights(hidden.data() + first * h, n, h, weight.data());
        for (int64_t e = 0; e < experts; ++e) {
          sweep_.RunInner(weights_.experts[static_cast<size_t>(e)],
                          capture.input.data() + first * h, n, inner.data(), width);
          double* sums = energy.data() + e * width;
          constexpr int64_t kColumns = 64;
          pool_.Run((width + kColumns - 1) / kColumns, [&](int64_t task, int) {
            for (int64_t t = 0; t < n; ++t) {
              for (int64_t i = task * kColumns; i < std::min(width, (task + 1) * kColumns); ++i) {
                const float a = inner[static_cast<size_t>(t * width + i)];
                sums[i] += static_cast<double>(weight[static_cast<size_t>(t)] * a * a);
              }
            }
          });
        }
      }
    }
    pool_.Run(experts, [&](int64_t e, int) {
      const WeightMatrix& down = weights_.experts[static_cast<size_t>(e)].down;
      std::vector<double> squares(static_cast<size_t>(width));
      for (int64_t i = 0; i < h; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          const auto d = static_cast<double>(
              LoadAsFloat(down.dtype, down.data, static_cast<size_t>(i * width + j)));
          squares[static_cast<size_t>(j)] += d * d;
        }
      }
      const double routing = capture.routing.weight[static_cast<size_t>(e)];
      for (int64_t j = 0; j < width; ++j) {
        energy[static_cast<size_t>(e * width + j)] *=
            routing * routing * squares[static_cast<size_t>(j)];
      }
    });
    return energy;
  }

  void Neurons() {
    const int64_t h = config_.hidden_size, forced = ForcedFeatures(config_, layer_config_);
    const int64_t width = layer_config_.expert_width, m = forced + num_candidates_;
    const std::vector<int64_t> neurons = Candidates();
    const ChosenNeurons gathered(weights_, neurons, width);
    FeatureMoments moments(m, h);
    TileCapture capture(h, !config_.shared_expert_gated, false);
    std::vector<float> features(static_cast<size_t>(kRows * m)), weight(kRows);
    ForTiles(capture, [&](const SequenceTile& tile, const float* after) {
      for (int64_t first = 0; first < tile.num_tokens; first += kRows) {
        const int64_t n = std::min(kRows, tile.num_tokens - first);
        const float* x = capture.input.data() + first * h;
        if (forced > 0) sweep_.RunInner(weights_.shared, x, n, features.data(), m);
        gathered.Run(sweep_, x, n, features.data() + forced, m);
        TokenWeights(after + first * h, n, h, weight.data());
        moments.Add(features.data(), capture.output.data() + first * h, weight.data(), n, pool_);
      }
    });
    moments.Finish();
    Alphas alphas(moments, weights_, forced, width, neurons);
    const NeuronChoice choice = ChooseNeurons(moments, forced, max_width_ * width, pool_, control_);
    for (const int64_t feature : choice.order) {
      const int64_t neuron = neurons[static_cast<size_t>(feature - forced)];
      result_.neuron_experts.push_back(static_cast<int32_t>(neuron / width));
      result_.neuron_rows.push_back(static_cast<int32_t>(neuron % width));
    }
    size_t before = 0;
    for (int64_t w = 0; w <= max_width_; ++w) {
      const auto taken =
          static_cast<size_t>(std::min<int64_t>(w * width, std::ssize(choice.order)));
      result_.width_errors.push_back(choice.remaining[taken]);
      double fold_error = 0;
      result_.width_alphas.push_back(
          alphas.With(std::span(choice.order).subspan(before, taken - before), fold_error));
      before = taken;
      result_.width_fold_errors.push_back(fold_error);
    }
  }

  // Least-squares weights of the chosen neurons of each expert with their own down projections.
  // Keeps what it needs of the moments, which the choice destroys.
  class Alphas {
   public:
    // `neurons` of all experts, numbered expert by expert, are the features behind the forced.
    Alphas(const FeatureMoments& moments, const LayerWeights& weights, int64_t forced,
           int64_t width, const std::vector<int64_t>& neurons)
        : m_(moments.num_features()), h_(moments.hidden()), forced_(forced) {
      gram_.assign(moments.gram(), moments.gram() + m_ * m_);
      cross_.assign(moments.cross(), moments.cross() + m_ * h_);
      experts_ = weights.num_experts();
      down_.resize(static_cast<size_t>(m_ * h_));
      const auto fill = [&](const FeedForwardWeights& part, int64_t neuron, int64_t feature) {
        for (int64_t i = 0; i < h_; ++i) {
          down_[static_cast<size_t>(feature * h_ + i)] = LoadAsFloat(
              part.down.dtype, part.down.data, static_cast<size_t>(i * part.width() + neuron));
        }
      };
      for (int64_t j = 0; j < forced; ++j) fill(weights.shared, j, j);
      for (size_t i = 0; i < neurons.size(); ++i) {
        expert_.push_back(static_cast<size_t>(neurons[i] / width));
        fill(weights.experts[expert_.back()], neurons[i] % width, forced + static_cast<int64_t>(i));
      }
      // The shared expert is no choice: what it puts out is taken from the target.
      target_square_ = moments.target_square();
      for (int64_t s = 0; s < forced; ++s) {
        const float* row = down_.data() + s * h_;
        for (int64_t c = 0; c < h_; ++c) {
          target_square_ -=
              2 * cross_[static_cast<size_t>(s * h_ + c)] * static_cast<double>(row[c]);
        }
        for (int64_t r = 0; r < forced; ++r) {
          target_square_ += gram_[static_cast<size_t>(s * m_ + r)] *
                            static_cast<double>(Dot(row, down_.data() + r * h_, h_));
        }
      }
      for (int64_t i = 0; i < m_; ++i) {
        for (int64_t s = 0; s < forced; ++s) {
          const double g = gram_[static_cast<size_t>(i * m_ + s)];
          for (int64_t c = 0; c < h_; ++c) {
            cross_[static_cast<size_t>(i * h_ + c)] -=
                g * static_cast<double>(down_[static_cast<size_t>(s * h_ + c)]);
          }
        }
      }
    }

    // With more neurons beside those of the calls before.
    std::vector<double> With(std::span<const int64_t> more, double& error) {
      const auto e = static_cast<size_t>(experts_);
      gram_of_experts_.resize(e * e);
      cross_of_experts_.resize(e);
      for (const int64_t a : more) {
        const size_t ea = expert_[static_cast<size_t>(a - forced_)];
        const float* down = down_.data() + a * h_;
        for (int64_t i = 0; i < h_; ++i) {
          cross_of_experts_[ea] +=
              cross_[static_cast<size_t>(a * h_ + i)] * static_cast<double>(down[i]);
        }
        chosen_.push_back(a);
        for (const int64_t b : chosen_) {
          const size_t eb = expert_[static_cast<size_t>(b - forced_)];
          const double product = gram_[static_cast<size_t>(a * m_ + b)] *
                                 static_cast<double>(Dot(down, down_.data() + b * h_, h_));
          gram_of_experts_[ea * e + eb] += product;
          if (a != b) gram_of_experts_[eb * e + ea] += product;
        }
      }
      std::vector<double> alphas = SolveAlphas(gram_of_experts_, cross_of_experts_);
      error = ErrorOfAlphas(gram_of_experts_, cross_of_experts_, target_square_, alphas);
      return alphas;
    }

   private:
    int64_t m_, h_, forced_, experts_ = 0;
    std::vector<size_t> expert_;  // of each feature behind the forced
    std::vector<double> gram_, cross_;
    std::vector<int64_t> chosen_;
    std::vector<double> gram_of_experts_, cross_of_experts_;  // [E, E], [E] of the chosen neurons
    std::vector<float> down_;                                 // [M, hidden]
    double target_square_ = 0;  // of the output without the shared expert's
  };

  void Experts() {
    TileCapture capture(config_.hidden_size, true, true);
    ForTiles(capture, [](const SequenceTile&, const float*) {});
    const auto e = static_cast<size_t>(weights_.num_experts());
    std::vector<double> gram(e * e);
    size_t at = 0;
    for (size_t i = 0; i < e; ++i) {
      for (size_t j = i; j < e; ++j) gram[i * e + j] = gram[j * e + i] = capture.gram[at++];
    }
    const ExpertChoice choice = ChooseExperts(gram, capture.cross, capture.square, max_width_);
    for (const int32_t expert : choice.order) {
      for (int32_t row = 0; row < layer_config_.expert_width; ++row) {
        result_.neuron_experts.push_back(expert);
        result_.neuron_rows.push_back(row);
      }
    }
    result_.width_errors = choice.remaining;
    result_.width_alphas = choice.alphas;
    result_.width_fold_errors = choice.remaining;
    result_.width_fold_errors.resize(static_cast<size_t>(max_width_) + 1, choice.remaining.back());
    result_.width_errors.resize(static_cast<size_t>(max_width_) + 1, choice.remaining.back());
    result_.width_alphas.resize(static_cast<size_t>(max_width_) + 1, choice.alphas.back());
  }

  const ModelConfig& config_;
  const LayerConfig& layer_config_;
  const int64_t layer_;
  const LayerWeights& weights_;
  const int64_t max_width_;
  const int64_t num_candidates_;  // 0: whole experts
  LayerSweep& sweep_;
  HiddenStates& stream_;
  ThreadPool& pool_;
  const JobControl& control_;
  CondenseLayer result_;
  int64_t tokens_ = 0;
};

}  // namespace

int64_t CandidateNeurons(const ModelConfig& config, const LayerConfig& layer, int64_t width,
                         int64_t most_neurons) {
  const int64_t all = layer.num_experts * layer.expert_width;
  const int64_t room = most_neurons - ForcedFeatures(config, layer);
  if (all <= room) return all;
  const int64_t wanted = width * layer.expert_width;
  if (wanted == 0 || room < wanted + wanted / 2) return 0;
  return std::min(room, kCandidatesOfOne * wanted);
}

CondenseLayer ChooseLayerNeurons(const Model& model, int64_t layer, const LayerWeights& weights,
                                 const NeuronWidth& most, LayerSweep& sweep, HiddenStates& stream,
                                 ThreadPool& pool, const JobControl& control) {
  return LayerPass(model, layer, weights, most, sweep, stream, pool, control).Run();
}

uint64_t NeuronPassBytes(const ModelConfig& config, const LayerConfig& layer,
                         const NeuronWidth& most, int64_t tile_tokens) {
  const int64_t h = config.hidden_size;
  const int64_t candidates = CandidateNeurons(config, layer, most.width, most.most_neurons);
  const uint64_t tile = 2 * HiddenStates::Bytes(tile_tokens, h);
  if (candidates == 0) return tile;
  const int64_t m = ForcedFeatures(config, layer) + candidates;
  const int64_t all = layer.num_experts * layer.expert_width;
  const bool some = candidates < all;
  // The moments, a copy of them for the weights, the features of some tokens, the down projections;
  // of the candidates alone, a tile again, energies, and their gate and up projections.
  return tile + FeatureMoments::Bytes(m, h, kRows) +
         static_cast<uint64_t>(m * m + m * h) * sizeof(double) +
         static_cast<uint64_t>((kRows + h) * m) * sizeof(float) +
         (some ? HiddenStates::Bytes(tile_tokens, h) +
                     static_cast<uint64_t>(all + candidates) * 2 * sizeof(double) +
                     static_cast<uint64_t>(kRows * layer.expert_width) * sizeof(float) +
                     static_cast<uint64_t>(2 * candidates * (h + kRows)) * sizeof(float)
               : 0);
}

}  // namespace winnow
