// CD-MoE's searches against the values of the published programs, and that neither threads, nor
// where things are held, nor interruptions change a byte.
#include <gtest/gtest.h>

#include <atomic>

#include "base/error.h"
#include "condense/layer_search.h"
#include "condense/test_support.h"

namespace winnow {
namespace {

// The published program computes in f32: its weights differ from f64 by 3e-7, its divergences by
// 6e-7, ours by about 1e-6 (kernels/divergence_test.cc).
constexpr double kAlphaLimit = 1e-5, kDivergenceLimit = 2e-5;
// Closer candidates may come out either way.
constexpr double kDecidedMargin = 1e-4;

// The first documents alone, for tests that compare our runs with each other.
std::vector<SourceBlocks> SomeText(const std::string& kind) {
  std::vector<SourceBlocks> text = CdMoeText(kind);
  TokenSequences& all = text.front().sequences;
  all.offsets.resize(4);
  all.ids.resize(static_cast<size_t>(all.offsets.back()));
  return text;
}

CondenseStats Observe(const fs::path& output, int threads, bool all_text, bool resume = false,
                      const JobControl& control = {}) {
  const Model model = CdMoeModel();
  const CondenseOptions options{.max_experts = 4,
                                .resume = resume,
                                .checkpoint_seconds = 0,
                                .memory_budget_bytes = kAmpleBudget};
  ThreadPool pool(threads);
  const auto text = all_text ? CdMoeText : SomeText;
  const CondensePlan plan = PlanCondense(model, text("search"), text("alpha"), options, threads);
  return RunCondense(model, options, plan, output, pool, control);
}

TEST(CondensePublished, WeightsDivergencesAndOrders) {
  const TestFolder folder;
  const CondenseStats stats = Observe(folder.path() / "stats", 2, true);
  const Json reference = CdMoeReference();
  ASSERT_EQ(stats.layers.size(), reference["expert_search"].size());
  for (const CondenseLayer& layer : stats.layers) {
    SCOPED_TRACE(layer.layer);
    EXPECT_EQ(layer.layer, layer.moe_layer + 1);  // the first decoder layer is dense
    for (int32_t e = 0; e < layer.num_experts; ++e) {
      const std::string key = std::to_string(layer.moe_layer) + "-" + std::to_string(e);
      if (!reference["alpha"].contains(key)) {
        EXPECT_FALSE(layer.Alpha(e).has_value());
        continue;
      }
      const Json& alpha = reference["alpha"][key];
      EXPECT_EQ(layer.alpha_count[static_cast<size_t>(e)], alpha["count"].get<int64_t>());
      const auto mean = alpha["mean"].get<double>();
      EXPECT_NEAR(layer.Alpha(e).value(), mean, mean * kAlphaLimit);
    }
    const Json& steps = reference["expert_search"][static_cast<size_t>(layer.moe_layer)]["steps"];
    ASSERT_EQ(layer.steps.size(), steps.size());
    for (size_t s = 0; s < steps.size(); ++s) {
      const auto expected = steps[s]["js"].get<std::vector<double>>();
      ASSERT_EQ(layer.steps[s].candidates.size(), expected.size());
      for (size_t c = 0; c < expected.size(); ++c) {
        EXPECT_NEAR(layer.steps[s].candidates[c], expected[c], expected[c] * kDivergenceLimit);
      }
      if (steps[s]["margin"].get<double>() > kDecidedMargin) {
        EXPECT_EQ(layer.steps[s].chosen, steps[s]["chosen"].get<int32_t>());
      }
    }
  }
}

TEST(CondensePublished, LayerOrders) {
  const TestFolder folder;
  const CondenseStats stats = Observe(folder.path() / "stats", 2, true);
  const TokenSet tokens = ReadSearchTokens(folder.path() / "stats", stats);
  const Model model = CdMoeModel();
  const Json reference = CdMoeReference();
  ThreadPool pool(2);
  for (const auto& [name, expected] : reference["layer_search"].items()) {
    if (name == "e2") continue;  // as the others
    SCOPED_TRACE(name);
    const int64_t experts = std::stoll(name.substr(1));
    const CondenseWeights condense = [&](int64_t moe_layer, const LayerWeights& intact) {
      const CondenseLayer& layer = stats.layers[static_cast<size_t>(moe_layer)];
      std::vector<int32_t> kept;
      std::vector<float> alphas;
      for (int64_t i = 0; i < experts; ++i) {
        kept.push_back(layer.steps[static_cast<size_t>(i)].chosen);
        alphas.push_back(static_cast<float>(layer.AlphaOrDefault(kept.back())));
      }
      return CondensedWeights{intact.Condensed(kept, alphas), {}};
    };
    std::vector<std::vector<GreedyStep>> runs;
    const LayerSearchOptions options{
        .num_layers = 4, .memory_budget_bytes = kAmpleBudget, .spill_folder = folder.path()};
    LayerSearchPlan plan = PlanLayerSearch(model, tokens, options, 2);
    runs.push_back(SearchLayersGreedily(model, tokens, condense, options, plan, pool, {}));
    if (name == "e0") {  // the other way to hold things: a layer at a time, streams in files
      plan.resident = plan.prefetch = false;
      plan.spill = true;
      runs.push_back(SearchLayersGreedily(model, tokens, condense, options, plan, pool, {}));
    }
    const Json& steps = expected["steps"];
    for (const std::vector<GreedyStep>& run : runs) {
      ASSERT_EQ(run.size(), steps.size());
      for (size_t s = 0; s < run.size(); ++s) {
        const auto js = steps[s]["js"].get<std::vector<double>>();
        ASSERT_EQ(run[s].candidates.size(), js.size());
        for (size_t c = 0; c < js.size(); ++c) {
          EXPECT_NEAR(run[s].candidates[c], js[c], js[c] * kDivergenceLimit);
        }
        EXPECT_EQ(run[s].chosen, steps[s]["chosen"].get<int32_t>());
        EXPECT_EQ(run[s].candidates, runs[0][s].candidates);
      }
    }
  }
}

// KL of the logits of one condensed layer against the definition on whole rows of logits.
TEST(LayerSearch, KlIsThatOfTheLogits) {
  const Model model = CdMoeModel();
  TokenSet tokens;
  const std::vector<int32_t> ids = {1, 40, 80, 120, 90, 33, 70};
  tokens.Append(ids);
  ThreadPool pool(1);
  const LayerSearchOptions options{.num_layers = 4, .memory_budget_bytes = kAmpleBudget};
  const LayerSearchPlan plan = PlanLayerSearch(model, tokens, options, 1);
  const CondenseWeights condense = [](int64_t, const LayerWeights& intact) {
    return CondensedWeights{intact.Condensed({3, 1}, {0.2f, 0.1f}), {}};
  };
  const std::vector<double> kl = SingleLayerKl(model, tokens, condense, options, plan, pool, {});
  const ForwardTrace intact = RunForward(model, tokens);
  for (size_t m = 0; m < kl.size(); ++m) {
    const JobControl control;
    LayerReader reader(model, {.prefetch = false});
    LayerSweep sweep(model, tokens, pool, control, "test");
    HiddenStates states(tokens.num_tokens(), model.config().hidden_size);
    sweep.Embed(states);
    for (int64_t layer = 0; layer < model.config().num_layers(); ++layer) {
      const LayerWeights& weights = reader.Get(layer);
      const bool here = layer == static_cast<int64_t>(m) + 1;
      sweep.RunLayer(layer, here ? condense(0, weights).weights : weights, states, nullptr);
    }
    const int64_t n = tokens.num_tokens(), vocabulary = model.config().vocab_size;
    std::vector<float> logits(static_cast<size_t>(n * vocabulary));
    ComputeLogits(model, pool, states.Load(0, n), n, logits.data());
    double expected = 0;
    for (int64_t t = 0; t < n; ++t) {
      const float* p = intact.logits.data() + t * vocabulary;
      const float* q = logits.data() + t * vocabulary;
      double zp = 0, zq = 0;
      for (int64_t v = 0; v < vocabulary; ++v) {
        zp += std::exp(static_cast<double>(p[v]));
        zq += std::exp(static_cast<double>(q[v]));
      }
      for (int64_t v = 0; v < vocabulary; ++v) {
        const double lp = static_cast<double>(p[v]) - std::log(zp);
        expected += std::exp(lp) * (lp - (static_cast<double>(q[v]) - std::log(zq)));
      }
    }
    // Logits are the same f32 numbers; their sums are in double, log-sum-exps of q in f32 exps.
    EXPECT_NEAR(kl[m], expected / static_cast<double>(n), 1e-6);
    EXPECT_GT(kl[m], 1e-4);
  }
  const CondenseWeights nothing = [](int64_t, const LayerWeights& intact_weights) {
    return CondensedWeights{intact_weights, {}};
  };
  for (const double same : SingleLayerKl(model, tokens, nothing, options, plan, pool, {})) {
    EXPECT_NEAR(same, 0, 1e-6);
  }
}

TEST(CondenseRun, TheSameBytesForAnyThreadsAndPlace) {
  const TestFolder folder;
  Observe(folder.path() / "one", 1, false);
  Observe(folder.path() / "three", 3, false);
  ExpectSameContent(folder.path() / "one", folder.path() / "three");
  // Outputs and streams in files.
  const Model model = CdMoeModel();
  const CondenseOptions options{.max_experts = 4, .memory_budget_bytes = kAmpleBudget};
  CondensePlan plan = PlanCondense(model, SomeText("search"), SomeText("alpha"), options, 2);
  plan.prefetch = false;
  plan.spill_streams = plan.spill_outputs = true;
  ThreadPool pool(2);
  RunCondense(model, options, plan, folder.path() / "spilled", pool, {});
  ExpectSameContent(folder.path() / "one", folder.path() / "spilled");
}

TEST(CondenseRun, InterruptedRunGoesOnWithTheSameBytes) {
  const TestFolder folder;
  Observe(folder.path() / "whole", 1, false);
  for (int stop_after : {3, 7, 9}) {
    std::atomic<bool> interrupted = false;
    int reports = 0;
    JobControl control;
    control.interrupted = &interrupted;
    control.on_progress = [&](const ProgressEvent&) { interrupted = ++reports >= stop_after; };
    const fs::path out = folder.path() / std::to_string(stop_after);
    EXPECT_THROW(Observe(out, 1, false, false, control), InterruptedError);
    EXPECT_FALSE(fs::exists(out));
    Observe(out, 1, false, true);
    ExpectSameContent(folder.path() / "whole", out);
  }
}

TEST(CondenseStats, DamageIsNamed) {
  const TestFolder folder;
  const CondenseStats stats = Observe(folder.path() / "stats", 1, false);
  const OrderedJson good = CondenseStatsToJson(stats);
  const auto parse = [](const OrderedJson& json) {
    return CondenseStatsFromJson(Json::parse(json.dump()), "stats.json");
  };
  EXPECT_EQ(CondenseStatsToJson(parse(good)), good);
  const auto expect_refused = [&](const std::function<void(OrderedJson&)>& damage) {
    OrderedJson bad = good;
    damage(bad);
    EXPECT_THROW(parse(bad), ModelError) << bad.dump().substr(0, 200);
  };
  expect_refused([](OrderedJson& j) { j["schema"] = "winnow.condense/9"; });
  expect_refused([](OrderedJson& j) { j["method"] = "other"; });
  expect_refused([](OrderedJson& j) { j["layers"][0]["experts"][0] = 99; });
  expect_refused(
      [](OrderedJson& j) { j["layers"][0]["experts"][1] = j["layers"][0]["experts"][0]; });
  expect_refused([](OrderedJson& j) { j["layers"][0]["alpha_count"][0] = -1; });
  expect_refused([](OrderedJson& j) { j["layers"][0]["alpha_sum"].erase(0); });
  expect_refused([](OrderedJson& j) { j["layers"][1]["layer"] = 1; });
  expect_refused([](OrderedJson& j) { j["max_experts"] = 1; });
  expect_refused([](OrderedJson& j) {
    for (const char* key : {"experts", "js", "js_candidates"}) j["layers"][2][key].clear();
  });
  // The text that layers are searched on must be the one observed.
  TokenSet other = ReadSearchTokens(folder.path() / "stats", stats);
  other.ids[3] += 1;
  WriteSearchTokens(folder.path() / "stats", other);
  EXPECT_THROW(ReadSearchTokens(folder.path() / "stats", stats), ModelError);
}

}  // namespace
}  // namespace winnow
