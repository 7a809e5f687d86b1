// The choice of neurons against least squares worked out by brute force.
#include "condense/neuron_choice.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "base/error.h"
#include "condense/test_support.h"
#include "kernels/elementwise.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

struct Data {
  int64_t n = 0, m = 0, h = 0;
  std::vector<float> features, target, weight;
};

Data MakeData(int64_t n, int64_t m, int64_t h, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Data data{n, m, h, {}, {}, {}};
  std::vector<float> truth(static_cast<size_t>(m * h));
  for (float& value : truth) value = normal(random);
  for (int64_t j = 0; j < m; ++j) {  // neurons of very different importance
    for (int64_t i = 0; i < h; ++i)
      truth[static_cast<size_t>(j * h + i)] /= static_cast<float>(1 + (j * 7) % m);
  }
  for (int64_t t = 0; t < n; ++t) {
    data.weight.push_back(0.1f + std::abs(normal(random)));
    std::vector<float> row(static_cast<size_t>(m));
    for (int64_t j = 0; j < m; ++j) {
      row[static_cast<size_t>(j)] =
          normal(random) + (j > 0 ? 0.5f * row[static_cast<size_t>(j - 1)] : 0.3f);
      data.features.push_back(row[static_cast<size_t>(j)]);
    }
    for (int64_t i = 0; i < h; ++i) {
      float y = 0.2f * normal(random) + 1;
      for (int64_t j = 0; j < m; ++j)
        y += row[static_cast<size_t>(j)] * truth[static_cast<size_t>(j * h + i)];
      data.target.push_back(y);
    }
  }
  return data;
}

// The least weighted error of an affine map of some features plus the choice's damping: normal
// equations of centred moments, solved by Gauss-Jordan.
double LeastError(const Data& data, const std::vector<int64_t>& features, double damping) {
  const size_t k = features.size();
  const auto at = [&](int64_t t, size_t f) {
    return static_cast<double>(data.features[static_cast<size_t>(t * data.m + features[f])]);
  };
  double total = 0;
  std::vector<double> mean(k), target_mean(static_cast<size_t>(data.h));
  for (int64_t t = 0; t < data.n; ++t) {
    const auto w = static_cast<double>(data.weight[static_cast<size_t>(t)]);
    total += w;
    for (size_t f = 0; f < k; ++f) mean[f] += w * at(t, f);
    for (int64_t i = 0; i < data.h; ++i) {
      target_mean[static_cast<size_t>(i)] +=
          w * static_cast<double>(data.target[static_cast<size_t>(t * data.h + i)]);
    }
  }
  for (double& v : mean) v /= total;
  for (double& v : target_mean) v /= total;
  double error = 0;
  std::vector<double> a(k * k), b(k * static_cast<size_t>(data.h));
  for (int64_t t = 0; t < data.n; ++t) {
    const auto w = static_cast<double>(data.weight[static_cast<size_t>(t)]);
    for (int64_t i = 0; i < data.h; ++i) {
      const double y = static_cast<double>(data.target[static_cast<size_t>(t * data.h + i)]) -
                       target_mean[static_cast<size_t>(i)];
      error += w * y * y;
      for (size_t f = 0; f < k; ++f)
        b[f * static_cast<size_t>(data.h) + static_cast<size_t>(i)] += w * (at(t, f) - mean[f]) * y;
    }
    for (size_t f = 0; f < k; ++f) {
      for (size_t g = 0; g < k; ++g)
        a[f * k + g] += w * (at(t, f) - mean[f]) * (at(t, g) - mean[g]);
    }
  }
  for (size_t f = 0; f < k; ++f) a[f * k + f] += damping;
  const std::vector<double> cross = b;
  for (size_t p = 0; p < k; ++p) {
    for (size_t r = 0; r < k; ++r) {
      if (r == p) continue;
      const double factor = a[r * k + p] / a[p * k + p];
      for (size_t c = 0; c < k; ++c) a[r * k + c] -= factor * a[p * k + c];
      for (size_t i = 0; i < static_cast<size_t>(data.h); ++i) {
        b[r * static_cast<size_t>(data.h) + i] -= factor * b[p * static_cast<size_t>(data.h) + i];
      }
    }
  }
  for (size_t f = 0; f < k; ++f) {
    for (size_t i = 0; i < static_cast<size_t>(data.h); ++i) {
      error -= cross[f * static_cast<size_t>(data.h) + i] * b[f * static_cast<size_t>(data.h) + i] /
               a[f * k + f];
    }
  }
  return error;
}

FeatureMoments MomentsOf(const Data& data, ThreadPool& pool, int64_t rows_a_call) {
  FeatureMoments moments(data.m, data.h);
  std::vector<float> features = data.features, target = data.target;
  for (int64_t first = 0; first < data.n; first += rows_a_call) {
    const int64_t rows = std::min(rows_a_call, data.n - first);
    moments.Add(features.data() + first * data.m, target.data() + first * data.h,
                data.weight.data() + first, rows, pool);
  }
  moments.Finish();
  return moments;
}

TEST(FeatureMoments, AreTheWeightedSums) {
  const Data data = MakeData(40, 300, 5, 3);  // wider than a panel of products
  ThreadPool pool(2);
  const FeatureMoments moments = MomentsOf(data, pool, 16);
  double worst = 0;
  for (int64_t i = 0; i < data.m; i += 13) {
    for (int64_t j = 0; j < data.m; j += 17) {
      double sum = 0, magnitude = 0;
      for (int64_t t = 0; t < data.n; ++t) {
        const double term =
            static_cast<double>(data.weight[static_cast<size_t>(t)]) *
            static_cast<double>(data.features[static_cast<size_t>(t * data.m + i)]) *
            static_cast<double>(data.features[static_cast<size_t>(t * data.m + j)]);
        sum += term;
        magnitude += std::abs(term);
      }
      worst = std::max(worst, std::abs(moments.gram()[i * data.m + j] - sum) / magnitude);
    }
  }
  // Two roundings of the root of the weight, one of each product: a few units of f32.
  EXPECT_LT(worst, 1e-6);
}

TEST(NeuronChoice, EveryStepTakesTheNeuronThatLeavesLeast) {
  const Data data = MakeData(400, 14, 3, 5);
  ThreadPool pool(2);
  for (const int64_t forced : {0, 3}) {
    FeatureMoments moments = MomentsOf(data, pool, 400);
    double trace = 0;
    const double n = moments.weight_sum();
    for (int64_t i = 0; i < data.m; ++i) {
      const double s = moments.feature_sum()[static_cast<size_t>(i)];
      trace += moments.gram()[i * data.m + i] - s * s / n;
    }
    const double damping = 1e-3 * trace / static_cast<double>(data.m);
    const NeuronChoice choice = ChooseNeurons(moments, forced, 6, pool, {});
    ASSERT_EQ(choice.order.size(), 6u);
    ASSERT_EQ(choice.remaining.size(), 7u);
    std::vector<int64_t> taken;
    for (int64_t i = 0; i < forced; ++i) taken.push_back(i);
    const double start = LeastError(data, taken, damping);
    EXPECT_NEAR(choice.remaining[0], start, 1e-4 * start);
    for (size_t s = 0; s < choice.order.size(); ++s) {
      double least = 1e300;
      int64_t best = -1;
      for (int64_t f = 0; f < data.m; ++f) {
        if (std::find(taken.begin(), taken.end(), f) != taken.end()) continue;
        std::vector<int64_t> with = taken;
        with.push_back(f);
        const double error = LeastError(data, with, damping);
        if (error < least) {
          least = error;
          best = f;
        }
      }
      EXPECT_EQ(choice.order[s], best) << "step " << s;
      // The moments come from f32 products.
      EXPECT_NEAR(choice.remaining[s + 1], least, 1e-4 * start);
      taken.push_back(choice.order[s]);
    }
  }
}

TEST(NeuronChoice, DependentNeuronsEndQuietly) {
  Data data = MakeData(100, 8, 2, 9);
  for (int64_t t = 0; t < data.n; ++t) {  // copies of the first, and nothing
    for (int64_t j = 1; j < data.m; ++j) {
      data.features[static_cast<size_t>(t * data.m + j)] =
          j % 2 == 0 ? 0.0f : data.features[static_cast<size_t>(t * data.m)];
    }
  }
  ThreadPool pool(1);
  FeatureMoments moments = MomentsOf(data, pool, 100);
  const NeuronChoice choice = ChooseNeurons(moments, 0, 8, pool, {});
  EXPECT_EQ(choice.order.size(), 8u);
  for (const double error : choice.remaining) EXPECT_TRUE(std::isfinite(error));
}

TEST(ExpertChoice, SolvesLeastSquaresOfWholeExperts) {
  // Three outputs in four dimensions, one token: f0 and f1 orthogonal, f2 a copy of f0.
  const std::vector<double> gram = {4, 0, 4, 0, 1, 0, 4, 0, 4};
  const std::vector<double> cross = {8, 3, 8};  // z = 2 f0 + 3 f1
  const ExpertChoice choice = ChooseExperts(gram, cross, 25, 2);
  EXPECT_EQ(choice.order, (std::vector<int32_t>{0, 1}));
  EXPECT_NEAR(choice.remaining[1], 9, 1e-4);
  EXPECT_NEAR(choice.remaining[2], 0, 1e-4);
  // The ridge of 1e-6 of the mean diagonal.
  EXPECT_NEAR(choice.alphas[2][0], 2, 1e-5);
  EXPECT_NEAR(choice.alphas[2][1], 3, 1e-4);
  EXPECT_EQ(choice.alphas[2][2], 0);
}

// The whole of observe --method condense, for families with and without a shared expert, gated or
// not: the same bytes for any number of threads, errors that fall with width, different neurons.
class NeuronPass : public testing::TestWithParam<const char*> {
 protected:
  static SourceBlocks GoldenText() {
    const TokenSet tokens = GoldenTokens(GetParam());
    return {.name = "ids", .sequences = {tokens.ids, tokens.offsets}};
  }
};

TEST_P(NeuronPass, ChoosesForEveryFamily) {
  const Model model = Model::Open(GoldenFolder(GetParam()));
  const TestFolder folder;
  const SourceBlocks source = GoldenText();
  std::vector<CondenseStats> runs;
  for (const int threads : {1, 3}) {
    const CondenseOptions options{
        .method = CondenseMethod::kNeurons, .max_experts = 2, .memory_budget_bytes = kAmpleBudget};
    const CondensePlan plan = PlanCondense(model, {source}, {}, options, threads);
    ThreadPool pool(threads);
    runs.push_back(
        RunCondense(model, options, plan, folder.path() / std::to_string(threads), pool, {}));
  }
  ExpectSameContent(folder.path() / "1", folder.path() / "3");
  EXPECT_EQ(CondenseStatsToJson(ReadCondenseStats(folder.path() / "1")),
            CondenseStatsToJson(runs[0]));
  EXPECT_NO_THROW(CheckCondenseStats(runs[0], model));
  for (const auto& damage : std::vector<std::function<void(CondenseLayer&)>>{
           [](CondenseLayer& l) { l.neuron_rows[0] = 50'000'000; },
           [](CondenseLayer& l) {
             l.neuron_rows[1] = l.neuron_rows[0], l.neuron_experts[1] = l.neuron_experts[0];
           },
           [](CondenseLayer& l) { l.neuron_rows.pop_back(), l.neuron_experts.pop_back(); },
           [](CondenseLayer& l) { l.width_alphas[1][0] = 1e300; }}) {
    CondenseStats bad = runs[0];
    damage(bad.layers[0]);
    EXPECT_THROW(CheckCondenseStats(bad, model), ModelError);
  }
  for (const CondenseLayer& layer : runs[0].layers) {
    ASSERT_EQ(layer.width_errors.size(), 3u);
    EXPECT_GT(layer.width_errors[0], layer.width_errors[1]);
    EXPECT_GT(layer.width_errors[1], layer.width_errors[2]);
    std::vector<std::pair<int32_t, int32_t>> neurons;
    for (size_t i = 0; i < layer.neuron_rows.size(); ++i) {
      neurons.emplace_back(layer.neuron_experts[i], layer.neuron_rows[i]);
    }
    std::sort(neurons.begin(), neurons.end());
    EXPECT_EQ(std::adjacent_find(neurons.begin(), neurons.end()), neurons.end());
    EXPECT_EQ(std::ssize(neurons),
              2 * model.config().layers[static_cast<size_t>(layer.layer)].expert_width);
  }
}
// Mean of activation^2, tokens counting 1 / |h'|^2, times (sum of routing weights)^2 times the
// square of the down projection's column, of every neuron of every expert of a layer.
std::vector<double> EnergyReference(const Model& model, int64_t layer, const TokenSet& tokens) {
  const ModelConfig& config = model.config();
  const ForwardTrace trace = RunForward(model, tokens);
  const TracedLayer& seen = trace.layers.at(layer);
  LayerReader reader(model, {});
  const LayerWeights& weights = reader.Get(layer);
  const int64_t h = config.hidden_size, k = config.num_experts_per_tok, n = tokens.num_tokens();
  std::vector<double> routing(weights.experts.size());
  for (int64_t i = 0; i < n * k; ++i) {
    const auto at = static_cast<size_t>(i);
    routing[static_cast<size_t>(seen.topk_ids[at])] += static_cast<double>(seen.topk_weights[at]);
  }
  std::vector<double> energy;
  std::vector<float> gate(static_cast<size_t>(h)), up(gate.size()), x(gate.size());
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    const FeedForwardWeights& expert = weights.experts[e];
    for (int64_t j = 0; j < expert.width(); ++j) {
      WidenRow(expert.gate, j, gate.data());
      WidenRow(expert.up, j, up.data());
      double sum = 0, column = 0;
      for (int64_t t = 0; t < n; ++t) {
        const float* residual = seen.residual.data() + t * h;
        RmsNorm(residual, 1, h, h, weights.post_attention_norm.data(), config.rms_norm_eps,
                x.data(), h);
        double a = 0, b = 0, stream = 0;
        for (int64_t i = 0; i < h; ++i) {
          const auto at = static_cast<size_t>(i);
          a += static_cast<double>(gate[at]) * static_cast<double>(x[at]);
          b += static_cast<double>(up[at]) * static_cast<double>(x[at]);
          const double after = static_cast<double>(residual[i]) +
                               static_cast<double>(seen.moe_out[static_cast<size_t>(t * h + i)]);
          stream += after * after;
        }
        const double inner = a / (1 + std::exp(-a)) * b;
        sum += inner * inner * static_cast<double>(h) / stream;
      }
      for (int64_t i = 0; i < h; ++i) {
        const auto d = static_cast<double>(LoadAsFloat(
            expert.down.dtype, expert.down.data, static_cast<size_t>(i * expert.width() + j)));
        column += d * d;
      }
      energy.push_back(sum * routing[e] * routing[e] * column);
    }
  }
  return energy;
}

TEST(CandidateNeurons, AreThreeForEachThatIsChosen) {
  ModelConfig config;
  LayerConfig layer;
  layer.num_experts = 64;
  layer.expert_width = 1408;
  layer.shared_width = 2816;
  EXPECT_EQ(CandidateNeurons(config, layer, 2, 92'928), 64 * 1408);
  EXPECT_EQ(CandidateNeurons(config, layer, 2, 92'927), 3 * 2 * 1408);
  EXPECT_EQ(CandidateNeurons(config, layer, 4, 12'288), 12'288 - 2816);  // as many as there is room
  EXPECT_EQ(CandidateNeurons(config, layer, 6, 12'288), 0);
  EXPECT_EQ(CandidateNeurons(config, layer, 0, 12'288), 0);
  EXPECT_EQ(CandidateNeurons(config, layer, 2, 0), 0);
  config.shared_expert_gated = true;  // stays apart
  EXPECT_EQ(CandidateNeurons(config, layer, 4, 12'288), 12'288);
}

// What is chosen among some neurons is worse than what is chosen among all; and it is of those of
// most energy, which are worked out here from the layer's own values.
TEST_P(NeuronPass, ChoosesAmongNeuronsOfMostEnergy) {
  const Model model = Model::Open(GoldenFolder(GetParam()));
  const TestFolder folder;
  const SourceBlocks source = GoldenText();
  const ModelConfig& config = model.config();
  const LayerConfig& first = config.layers[static_cast<size_t>(config.MoeLayers()[0])];
  const int64_t forced = config.shared_expert_gated ? 0 : first.shared_width;
  const auto run = [&](int64_t most_neurons, int threads) {
    const CondenseOptions options{.method = CondenseMethod::kNeurons,
                                  .max_experts = 1,
                                  .most_neurons = most_neurons,
                                  .memory_budget_bytes = kAmpleBudget};
    const CondensePlan plan = PlanCondense(model, {source}, {}, options, threads);
    ThreadPool pool(threads);
    return RunCondense(
        model, options, plan,
        folder.path() / (std::to_string(most_neurons) + "-" + std::to_string(threads)), pool, {});
  };
  const CondenseStats all = run(kMostNeurons, 1);
  const int64_t room = forced + 2 * first.expert_width;
  const CondenseStats some = run(room, 1);
  run(room, 3);
  ExpectSameContent(folder.path() / (std::to_string(room) + "-1"),
                    folder.path() / (std::to_string(room) + "-3"));
  const std::vector<double> energy =
      EnergyReference(model, config.MoeLayers()[0], GoldenTokens(GetParam()));
  std::vector<double> sorted = energy;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const double least = sorted[static_cast<size_t>(2 * first.expert_width - 1)];
  for (size_t l = 0; l < all.layers.size(); ++l) {
    EXPECT_LE(all.layers[l].width_errors[1], some.layers[l].width_errors[1] * 1.001);
    // The shared expert's alone; the damping is a share of the mean diagonal, of other neurons.
    EXPECT_NEAR(some.layers[l].width_errors[0] / all.layers[l].width_errors[0], 1, 0.05);
  }
  for (size_t i = 0; i < some.layers[0].neuron_rows.size(); ++i) {
    const int64_t neuron =
        some.layers[0].neuron_experts[i] * first.expert_width + some.layers[0].neuron_rows[i];
    EXPECT_GE(energy[static_cast<size_t>(neuron)], least * (1 - 1e-6));
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, NeuronPass,
                         testing::Values("mixtral", "olmoe", "qwen2_moe", "qwen3_moe-bf16",
                                         "deepseek-bf16"),
                         TestName);

}  // namespace
}  // namespace winnow
