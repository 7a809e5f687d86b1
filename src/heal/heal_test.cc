// The ridge regression against a solution by other means, and healing of the bundled tiny models.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <map>
#include <random>

#include "base/error.h"
#include "checkpoint/test_folder.h"
#include "forward/test_support.h"
#include "heal/heal_run.h"
#include "heal/ridge_refit.h"
#include "kernels/elementwise.h"
#include "kernels/inverse.h"
#include "weights/fused_feed_forward.h"

namespace winnow {
namespace {

constexpr uint64_t kAmple = uint64_t{1} << 40;
constexpr int64_t kHidden = 5, kTokens = 400;

// Two experts, the second used by every other token, and a residual that is mostly linear in their
// activations.
struct Problem {
  ActivationStore store;
  std::vector<float> residual, weight;
  std::vector<uint8_t> held_out;
  std::vector<std::vector<double>> design;  // [T][2 * width], zero where an expert is not used
  size_t width;

  explicit Problem(size_t expert_width = 6, int64_t stride = 2) : width(expert_width) {
    const auto columns = static_cast<int64_t>(width);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<std::vector<float>> truth(kHidden, std::vector<float>(2 * width));
    for (auto& row : truth) {
      for (float& value : row) value = normal(random);
    }
    design.assign(kTokens, std::vector<double>(2 * width));
    for (int32_t e = 0; e < 2; ++e) {
      std::vector<float> gate, up;
      ExpertRows rows{.expert = e, .width = columns};
      for (int64_t t = 0; t < kTokens; t += e == 0 ? 1 : stride) {
        rows.tokens.push_back(t);
        rows.weights.push_back(0.3f + 0.1f * static_cast<float>(t % 5));
        for (size_t i = 0; i < width; ++i) {
          gate.push_back(normal(random));
          up.push_back(normal(random));
          float inner = 0;
          SwiGlu(&gate.back(), &up.back(), 1, &inner);
          design[static_cast<size_t>(t)][static_cast<size_t>(e) * width + i] =
              static_cast<double>(inner * rows.weights.back());
        }
      }
      rows.num_rows = static_cast<int64_t>(rows.tokens.size());
      rows.gate = gate.data();
      rows.up = up.data();
      store.Append(rows);
    }
    for (size_t t = 0; t < kTokens; ++t) {
      held_out.push_back(t % 5 == 2);
      weight.push_back(0.5f + 0.01f * static_cast<float>(t % 7));
      for (size_t h = 0; h < kHidden; ++h) {
        double sum = static_cast<double>(2 * normal(random));
        for (size_t i = 0; i < 2 * width; ++i) {
          sum += static_cast<double>(truth[h][i]) * design[t][i];
        }
        residual.push_back(static_cast<float>(sum));
      }
    }
  }

  LayerRefit Solve(int threads, RefitOptions options) const {
    ThreadPool pool(threads);
    return RefitDownProjections({.activations = store,
                                 .hidden = kHidden,
                                 .residual = residual,
                                 .weight = weight,
                                 .held_out = held_out},
                                options, pool, {});
  }
};

// The joint minimum over both experts at one lambda, from its normal equations.
std::vector<double> JointSolution(const Problem& problem, double lambda) {
  const size_t width = problem.width, n = 2 * width;
  std::vector<double> a(n * n), b(n * kHidden);
  for (size_t t = 0; t < kTokens; ++t) {
    const auto c = static_cast<double>(problem.weight[t]);
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < n; ++j)
        a[i * n + j] += c * problem.design[t][i] * problem.design[t][j];
      for (size_t h = 0; h < kHidden; ++h) {
        b[i * kHidden + h] +=
            c * problem.design[t][i] * static_cast<double>(problem.residual[t * kHidden + h]);
      }
    }
  }
  for (size_t e = 0; e < 2; ++e) {
    double trace = 0;
    for (size_t i = e * width; i < (e + 1) * width; ++i) trace += a[i * (n + 1)];
    for (size_t i = e * width; i < (e + 1) * width; ++i) {
      a[i * (n + 1)] += lambda * trace / static_cast<double>(width);
    }
  }
  EXPECT_TRUE(InvertPositiveDefiniteReference(a.data(), static_cast<int64_t>(n)));
  std::vector<double> solution(n * kHidden);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) {
      for (size_t h = 0; h < kHidden; ++h) {
        solution[i * kHidden + h] += a[i * n + j] * b[j * kHidden + h];
      }
    }
  }
  return solution;
}

void ExpectTheJointSolution(const Problem& problem, int sweeps, double limit) {
  const LayerRefit refit = problem.Solve(1, {.cache_bytes = 1 << 20, .sweeps = sweeps});
  ASSERT_GT(refit.lambda, 0);
  EXPECT_LT(refit.held_out_after, 0.9 * refit.held_out_before);
  ASSERT_EQ(refit.steps.size(), 2U);
  const std::vector<double> expected = JointSolution(problem, refit.lambda);
  const size_t width = problem.width;
  for (const RefitStep& step : refit.steps) {
    for (size_t h = 0; h < kHidden; ++h) {
      for (size_t i = 0; i < width; ++i) {
        const size_t row = static_cast<size_t>(step.expert) * width + i;
        EXPECT_NEAR(static_cast<double>(step.change[h * width + i]), expected[row * kHidden + h],
                    limit);
      }
    }
  }
}

// f32 products of 400 tokens: some hundred units of a value around 1.
TEST(RidgeRefit, BlockDescentReachesTheJointSolution) {
  ExpectTheJointSolution(Problem(), 30, 3e-5);
}

// 25 tokens use the second expert's 40 columns, so that it is solved in the space of its tokens.
TEST(RidgeRefit, FewerTokensThanColumnsReachTheJointSolution) {
  ExpectTheJointSolution(Problem(40, 16), 60, 1e-4);
}

TEST(RidgeRefit, IsTheSameForAnyThreadsAndWithoutACache) {
  const Problem problem;
  const LayerRefit one = problem.Solve(1, {.cache_bytes = 1 << 20});
  for (const LayerRefit& other :
       {problem.Solve(3, {.cache_bytes = 1 << 20}), problem.Solve(2, {})}) {
    EXPECT_EQ(one.lambda, other.lambda);
    ASSERT_EQ(one.steps.size(), other.steps.size());
    for (size_t i = 0; i < one.steps.size(); ++i) {
      EXPECT_TRUE(std::ranges::equal(one.steps[i].change.span(), other.steps[i].change.span()));
    }
  }
}

TEST(RidgeRefit, TakesNoStepThatHeldOutTokensDoNotConfirm) {
  Problem problem;
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  // Held-out tokens ask for the opposite of what the others ask for.
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t h = 0; h < kHidden; ++h) {
      if (problem.held_out[t] != 0) problem.residual[t * kHidden + h] *= -1;
    }
  }
  const LayerRefit refit = problem.Solve(1, {});
  EXPECT_EQ(refit.lambda, 0);
  EXPECT_TRUE(refit.steps.empty());
  EXPECT_EQ(refit.held_out_after, refit.held_out_before);
}

// Sequences of pseudo-random ids, which the tiny models know nothing of: enough to fit and judge.
SourceBlocks RandomSequences(const Model& model, int64_t sequences, int64_t tokens) {
  SourceBlocks source{"random", {}};
  std::mt19937 random(9);
  source.sequences.offsets.push_back(0);
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t t = 0; t < tokens; ++t) {
      source.sequences.ids.push_back(
          static_cast<int32_t>(random() % static_cast<uint32_t>(model.config().vocab_size)));
    }
    source.sequences.offsets.push_back(static_cast<int64_t>(source.sequences.ids.size()));
  }
  return source;
}

std::vector<std::vector<int32_t>> DropLastExpert(const Model& model) {
  std::vector<std::vector<int32_t>> kept(static_cast<size_t>(model.config().num_layers()));
  for (const int32_t layer : model.config().MoeLayers()) {
    const int64_t experts = model.config().layers[static_cast<size_t>(layer)].num_experts;
    for (int32_t e = 0; e + 1 < experts; ++e) kept[static_cast<size_t>(layer)].push_back(e);
  }
  return kept;
}

HealResult Heal(const Model& model, const fs::path& folder, int threads, uint64_t budget_bytes,
                bool resume = false, const JobControl& control = {}) {
  const std::vector<SourceBlocks> sources = {RandomSequences(model, 30, 40)};
  const HealOptions options{
      .kept_experts = DropLastExpert(model), .memory_budget_bytes = budget_bytes, .resume = resume};
  ThreadPool pool(threads);
  const HealPlan plan = PlanHeal(model, sources, options, threads);
  return RunHeal(model, options, plan, folder, pool, control);
}

std::map<std::string, std::string> HealedFiles(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    files[entry.path().filename().string()] = ReadTextFile(entry.path());
  }
  return files;
}

TEST(HealRun, RepairsEveryLayerOfEveryFamily) {
  for (const char* name : {"mixtral", "qwen2_moe", "qwen3_moe-bf16", "olmoe", "deepseek-bf16"}) {
    const Model model = Model::Open(GoldenFolder(name));
    const TestFolder folder;
    const HealResult result = Heal(model, folder.path() / "healed", 2, kAmple);
    ASSERT_EQ(result.layers.size(), model.config().MoeLayers().size()) << name;
    for (const HealedLayer& layer : result.layers) {
      EXPECT_GT(layer.error_before, 0) << name;
      EXPECT_LE(layer.error_after, layer.error_before) << name;
    }
    EXPECT_EQ(result.healed.tokens, 3 * 39);
  }
}

// One layer condensed (shared expert and half of the neurons of expert 2), the others pruned: one
// sweep refits both kinds; interrupted and resumed the same bytes.
TEST(HealRun, RefitsCondensedLayersWithPrunedOnes) {
  for (const char* name : {"mixtral", "qwen2_moe", "deepseek-bf16"}) {
    SCOPED_TRACE(name);
    const Model model = Model::Open(GoldenFolder(name));
    const int32_t layer = model.config().MoeLayers().front();
    const LayerConfig& config = model.config().layers[static_cast<size_t>(layer)];
    HealOptions options{.kept_experts = DropLastExpert(model), .memory_budget_bytes = kAmple};
    options.kept_experts[static_cast<size_t>(layer)].clear();
    std::vector<FusedPart>& parts = options.condensed[layer];
    if (config.shared_width > 0 && !model.config().shared_expert_gated) parts.push_back({});
    std::vector<int32_t> half;
    for (int32_t row = 0; row < config.expert_width / 2; ++row) half.push_back(2 * row);
    parts.push_back({.expert = 2, .alpha = 0.5, .neurons = half});
    parts.push_back({.expert = 0, .alpha = 0.2});
    const std::vector<SourceBlocks> sources = {RandomSequences(model, 30, 40)};
    const TestFolder folder;
    const auto heal = [&](const char* to, int threads, bool resume, const JobControl& control) {
      options.resume = resume;
      ThreadPool pool(threads);
      const HealPlan plan = PlanHeal(model, sources, options, threads);
      return RunHeal(model, options, plan, folder.path() / to, pool, control);
    };
    const HealResult result = heal("one", 1, false, {});
    EXPECT_GT(result.layers.front().lambda, 0);
    EXPECT_LT(result.layers.front().error_after, result.layers.front().error_before);
    const SafetensorsFile file =
        SafetensorsFile::Open(HealedLayerPath(folder.path() / "one", layer));
    const TensorInfo& down = file.Get(HealedTensorName(kDensePart));
    EXPECT_EQ(down.shape,
              (std::vector<uint64_t>{static_cast<uint64_t>(model.config().hidden_size),
                                     static_cast<uint64_t>(FusedWidth(parts, config.expert_width,
                                                                      config.shared_width))}));
    heal("three", 3, false, {});
    EXPECT_TRUE(HealedFiles(folder.path() / "three") == HealedFiles(folder.path() / "one"));
    std::atomic<bool> interrupted{false};
    JobControl control;
    control.interrupted = &interrupted;
    control.on_progress = [&](const ProgressEvent& event) { interrupted = event.layer > layer; };
    EXPECT_THROW(heal("parts", 1, false, control), InterruptedError);
    heal("parts", 1, true, {});
    EXPECT_TRUE(HealedFiles(folder.path() / "parts") == HealedFiles(folder.path() / "one"));
    // Another recipe is another run.
    parts.back().alpha = 0.3;
    fs::copy(folder.path() / "one", folder.path() / "other");
    EXPECT_THROW(heal("other", 1, true, {}), UsageError);
  }
}

TEST(HealRun, WritesTheSameBytesForAnyThreadsAndWithStreamsOnDisk) {
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  const TestFolder folder;
  const HealResult one = Heal(model, folder.path() / "one", 1, kAmple);
  const auto expected = HealedFiles(folder.path() / "one");
  EXPECT_GT(expected.size(), 1U);
  Heal(model, folder.path() / "three", 3, kAmple);
  EXPECT_TRUE(HealedFiles(folder.path() / "three") == expected);
  // The smallest budget that works holds streams and activations in files.
  uint64_t smallest = 0;
  try {
    Heal(model, folder.path() / "none", 1, 1 << 20);
  } catch (const ResourceError&) {
    const HealOptions options{.kept_experts = DropLastExpert(model), .memory_budget_bytes = kAmple};
    smallest = PlanHeal(model, {RandomSequences(model, 30, 40)}, options, 1).memory.total_bytes();
  }
  ASSERT_GT(smallest, 0U);
  for (uint64_t less = smallest - (64 << 10);; less -= 64 << 10) {
    try {
      const HealOptions options{.kept_experts = DropLastExpert(model), .memory_budget_bytes = less};
      if (!PlanHeal(model, {RandomSequences(model, 30, 40)}, options, 1).spill) continue;
      Heal(model, folder.path() / "spilled", 1, less);
      break;
    } catch (const ResourceError&) {
      FAIL() << "no budget makes it spill";
    }
  }
  EXPECT_TRUE(HealedFiles(folder.path() / "spilled") == expected);
}

TEST(HealRun, InterruptedGoesOnToTheSameBytes) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const TestFolder folder;
  Heal(model, folder.path() / "whole", 1, kAmple);
  std::atomic<bool> interrupted{false};
  JobControl control;
  control.interrupted = &interrupted;
  control.on_progress = [&](const ProgressEvent& event) { interrupted = event.layer == 1; };
  EXPECT_THROW(Heal(model, folder.path() / "parts", 1, kAmple, false, control), InterruptedError);
  EXPECT_TRUE(fs::exists(HealedLayerPath(folder.path() / "parts", 0)));
  Heal(model, folder.path() / "parts", 1, kAmple, true);
  EXPECT_TRUE(HealedFiles(folder.path() / "parts") == HealedFiles(folder.path() / "whole"));
}

}  // namespace
}  // namespace winnow
