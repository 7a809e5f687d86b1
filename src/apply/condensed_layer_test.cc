// Condensed checkpoints: the logits of the published program, and the same from every form they are
// stored in, for every family.
#include "apply/condensed_layer.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"
#include "forward/test_support.h"
#include "plan/loader_target.h"

namespace winnow {
namespace {

LayerPlan Intact(int32_t layer, int64_t num_experts) {
  LayerPlan plan;
  plan.layer = layer;
  plan.num_experts = num_experts;
  plan.kept.resize(static_cast<size_t>(num_experts));
  std::iota(plan.kept.begin(), plan.kept.end(), 0);
  return plan;
}

LayerPlan Condensed(int32_t layer, int64_t num_experts, std::vector<int32_t> experts,
                    std::vector<std::optional<double>> alphas) {
  LayerPlan plan = Intact(layer, num_experts);
  plan.kept = experts;
  std::sort(plan.kept.begin(), plan.kept.end());
  plan.dropped = OtherExperts(plan.kept, num_experts);
  plan.condensed = CondensePlanOfLayer{};
  plan.condensed->experts = std::move(experts);
  plan.condensed->alphas = std::move(alphas);
  return plan;
}

// A plan that condenses `layers` to experts 2, 0 with alphas .3 and the default, the rest intact.
CompressionPlan PlanOf(const Model& model, const std::vector<int32_t>& layers,
                       std::vector<int32_t> experts = {2, 0}) {
  CompressionPlan plan;
  plan.method = "test";
  plan.target = "winnow";
  plan.model_type = std::string(model.config().family->model_type);
  for (const int32_t index : model.config().MoeLayers()) {
    const int64_t e = model.config().layers[static_cast<size_t>(index)].num_experts;
    const bool here = std::find(layers.begin(), layers.end(), index) != layers.end();
    std::vector<std::optional<double>> alphas(static_cast<size_t>(e));
    alphas[2] = 0.3;
    plan.layers.push_back(here ? Condensed(index, e, experts, alphas) : Intact(index, e));
  }
  return plan;
}

Model Written(const Model& model, const CompressionPlan& plan, const ApplyOptions& options,
              const fs::path& output) {
  ApplyPlan(model, plan, PlanRewrite(model, plan, options), options, output, {});
  return Model::Open(output);
}

TEST(CondensedPublished, Logits) {
  const fs::path data = fs::path(WINNOW_TEST_DATA) / "cd-moe";
  const Model model = Model::Open(data / "tiny");
  const Json reference = ParseJson(ReadTextFile(data / "cd-moe.json"), "cd-moe.json");
  const SafetensorsFile values = SafetensorsFile::Open(data / "cd-moe.safetensors");
  const TokenSet tokens = TokensOf(ReadIntegers(values, "logit_ids"), 2);
  const TestFolder folder;
  for (const std::string tag : {"SR.e4.layers2", "S.e0.layers2"}) {
    CompressionPlan plan;
    plan.method = "cd-moe";
    plan.target = "winnow";
    for (int32_t m = 0; m < 4; ++m) {
      const auto it = reference["settings"][tag]["condensed"].find(std::to_string(m));
      if (it == reference["settings"][tag]["condensed"].end()) {
        plan.layers.push_back(Intact(m + 1, 16));
        continue;
      }
      std::vector<std::optional<double>> alphas;
      for (int e = 0; e < 16; ++e) {
        const std::string key = std::to_string(m) + "-" + std::to_string(e);
        alphas.push_back(reference["alpha"].contains(key)
                             ? std::optional(reference["alpha"][key]["mean"].get<double>())
                             : std::nullopt);
      }
      plan.layers.push_back(Condensed(m + 1, 16, it->get<std::vector<int32_t>>(), alphas));
    }
    const std::vector<float> expected = ReadArray<float>(values, "logits." + tag);
    double largest = 0;
    for (const float v : expected) largest = std::max(largest, std::abs(static_cast<double>(v)));
    for (const CondensedForm form : {CondensedForm::kParts, CondensedForm::kFused}) {
      const Model small = Written(model, plan, {.condensed_form = form},
                                  folder.path() / (tag + std::to_string(static_cast<int>(form))));
      EXPECT_LT(small.checkpoint().total_bytes(), model.checkpoint().total_bytes() * 3 / 4);
      const ForwardTrace trace = RunForward(small, tokens);
      // f32 against the published program's f32, as for intact models.
      EXPECT_LT(MaxDifference(trace.logits, expected), 1e-4 * largest) << tag;
    }
  }
}

class CondensedForms : public testing::TestWithParam<const char*> {};

// Parts, fused and, by a plan that the definition gives, a MoE layer whose router is replaced.
TEST_P(CondensedForms, AllComputeTheSame) {
  const Model model = Model::Open(GoldenFolder(GetParam()));
  const TokenSet tokens = GoldenTokens(GetParam());
  const std::vector<int32_t> moe = model.config().MoeLayers();
  const CompressionPlan plan = PlanOf(model, {moe.back()});
  const TestFolder folder;
  const Model parts = Written(model, plan, {}, folder.path() / "parts");
  const LayerConfig& layer = parts.config().layers[static_cast<size_t>(moe.back())];
  EXPECT_TRUE(layer.is_condensed);
  EXPECT_FALSE(layer.is_moe);
  EXPECT_EQ(layer.expert_alphas, (std::vector<double>{0.3, kUnselectedAlpha}));
  EXPECT_EQ(parts.config().MoeLayers().size(), moe.size() - 1);
  const ForwardTrace trace = RunForward(parts, tokens);
  // The definition, from the intact layer's un-routed outputs.
  const ForwardTrace intact =
      RunForward(model, tokens, {.watch = Watch::kExpertOutputs, .logits = false});
  const TracedLayer& watched = intact.layers.at(moe.back());
  const int64_t h = model.config().hidden_size, n = tokens.num_tokens();
  const int64_t e = model.config().layers[static_cast<size_t>(moe.back())].num_experts;
  if (moe.back() + 1 == model.config().num_layers()) {
    double worst = 0, largest = 0;
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < h; ++i) {
        const auto at = static_cast<size_t>(t * h + i);
        const auto f = [&](int64_t expert) {
          return static_cast<double>(
              watched.expert_outputs[static_cast<size_t>((t * e + expert) * h + i)]);
        };
        const double shared =
            static_cast<double>(watched.moe_out[at]) - static_cast<double>(watched.routed[at]);
        const double expected = static_cast<double>(watched.residual[at]) + shared + 0.3 * f(2) +
                                kUnselectedAlpha * f(0);
        worst = std::max(worst, std::abs(static_cast<double>(trace.hidden[at]) - expected));
        largest = std::max(largest, std::abs(expected));
      }
    }
    EXPECT_LT(worst, 1e-5 * largest);  // a few roundings of f32
  }
  const ApplyOptions fused_options{.condensed_form = CondensedForm::kFused, .dtype = Dtype::kF32};
  const Model fused = Written(model, plan, fused_options, folder.path() / "fused");
  EXPECT_LT(MaxDifference(RunForward(fused, tokens).logits, trace.logits), 2e-5);
  // Condensed models are models: prune what still has a router.
  CompressionPlan prune;
  prune.method = "test";
  for (const int32_t index : parts.config().MoeLayers()) {
    LayerPlan kept = Intact(index, parts.config().layers[static_cast<size_t>(index)].num_experts);
    kept.kept.pop_back();
    prune.layers.push_back(kept);
  }
  if (!prune.layers.empty()) {
    // To fewer experts than the condensed layer kept, too.
    for (LayerPlan& kept : prune.layers) {
      kept.kept.resize(
          static_cast<size_t>(std::max<int64_t>(model.config().num_experts_per_tok, 1)));
    }
    const Model smaller = Written(parts, prune, {}, folder.path() / "pruned");
    EXPECT_TRUE(smaller.config().layers[static_cast<size_t>(moe.back())].is_condensed);
    RunForward(smaller, tokens);
  }
}
INSTANTIATE_TEST_SUITE_P(Golden, CondensedForms,
                         testing::Values("mixtral", "mixtral-bf16-fused", "olmoe", "qwen2_moe",
                                         "qwen3_moe-bf16", "qwen3_moe-dense-layer",
                                         "deepseek-bf16"),
                         TestName);

TEST(CondensedStock, WrittenWhereTheFamilyHasWords) {
  const TestFolder folder;
  const ApplyOptions stock{.condensed_form = CondensedForm::kStock, .dtype = Dtype::kF32};
  // A width-less family: the widest decides. One with dense layers: theirs, filled up with zeros.
  for (const char* name : {"qwen3_moe-bf16", "qwen3_moe-dense-layer", "deepseek-bf16"}) {
    SCOPED_TRACE(name);
    const Model model = Model::Open(GoldenFolder(name));
    const std::vector<int32_t> moe = model.config().MoeLayers();
    const CompressionPlan plan = PlanOf(model, {moe.front()}, {2});
    const Model parts = Written(model, plan, {}, folder.path() / (std::string(name) + "-parts"));
    const Model written = Written(model, plan, stock, folder.path() / name);
    const LayerConfig& layer = written.config().layers[static_cast<size_t>(moe.front())];
    EXPECT_FALSE(layer.is_condensed);
    EXPECT_FALSE(layer.is_moe);
    EXPECT_FALSE(written.checkpoint().config().contains("condensed_layers"));
    const TokenSet tokens = GoldenTokens(name);
    // The same sums in another order.
    EXPECT_LT(MaxDifference(RunForward(written, tokens).logits, RunForward(parts, tokens).logits),
              2e-5);
  }
}

TEST(CondensedStock, RefusedWithTheReason) {
  const TestFolder folder;
  const ApplyOptions stock{.condensed_form = CondensedForm::kStock};
  const auto refusal = [&](const char* name, size_t moe_layer, std::vector<int32_t> experts) {
    const Model model = Model::Open(GoldenFolder(name));
    const int32_t layer = model.config().MoeLayers().at(moe_layer);
    try {
      PlanRewrite(model, PlanOf(model, {layer}, std::move(experts)), stock);
    } catch (const UsageError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_NE(refusal("mixtral", 0, {2}).find("experts in every layer"), std::string::npos);
  EXPECT_NE(refusal("qwen2_moe", 0, {2}).find("gate"), std::string::npos);
  EXPECT_NE(refusal("deepseek-bf16", 1, {2}).find("not layer"), std::string::npos);
}

TEST(CondensedPlan, IsChecked) {
  const Model model = Model::Open(GoldenFolder("deepseek-bf16"));
  const int32_t layer = model.config().MoeLayers().front();
  const CompressionPlan good = PlanOf(model, {layer});
  EXPECT_NO_THROW(CheckPlan(good, model));
  EXPECT_EQ(PlanToJson(PlanFromJson(Json::parse(PlanToJson(good).dump()), "plan")),
            PlanToJson(good));
  const auto expect_refused =
      [&](const std::function<void(CondensePlanOfLayer&, LayerPlan&)>& damage) {
        CompressionPlan bad = good;
        damage(*bad.layers.front().condensed, bad.layers.front());
        EXPECT_THROW(CheckPlan(bad, model), UsageError);
      };
  expect_refused([](auto& c, auto&) { c.experts = {2, 2}; });
  expect_refused([](auto& c, auto&) { c.experts = {2, 99}; });
  expect_refused([](auto& c, auto&) { c.experts = {2, 1}; });  // not those of `kept`
  expect_refused([](auto& c, auto&) { c.neurons = {{0}}; });
  expect_refused([](auto& c, auto&) { c.neurons = {{0}, {1, 0}}; });
  expect_refused([](auto& c, auto&) { c.neurons = {{0}, {100000}}; });
  expect_refused([](auto& c, auto&) { c.alphas[2] = 1e30; });
  expect_refused([](auto& c, auto&) { c.alphas.pop_back(); });
  expect_refused([](auto&, auto& layer_plan) { layer_plan.beta = 0.5; });
  // Without a shared expert something must stay.
  const Model mixtral = Model::Open(GoldenFolder("mixtral"));
  CompressionPlan empty = PlanOf(mixtral, {0});
  empty.layers.front().condensed->experts = {};
  empty.layers.front().kept = {};
  EXPECT_THROW(CheckPlan(empty, mixtral), UsageError);
  EXPECT_THROW(CheckTarget(good, "transformers"), UsageError);
  EXPECT_NO_THROW(CheckTarget(good, "winnow"));
}

// Single neurons: the rows and columns of the plan, times their expert's weight.
TEST(CondensedPlan, NeuronsAreGathered) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  CompressionPlan plan = PlanOf(model, {1});
  plan.layers[1].condensed->neurons = {{1, 5}, {0}};
  const TestFolder folder;
  const Model written = Written(model, plan, {.dtype = Dtype::kF32}, folder.path() / "out");
  EXPECT_EQ(written.config().layers[1].dense_width, 3);
  LayerReader source(model, {.prefetch = false}), target(written, {.prefetch = false});
  const LayerWeights& from = source.Get(1);
  const LayerWeights& to = target.Get(1);
  const int64_t h = model.config().hidden_size;
  const auto at = [](const WeightMatrix& w, int64_t r, int64_t c) {
    return LoadAsFloat(w.dtype, w.data, static_cast<size_t>(r * w.cols + c));
  };
  const std::vector<std::pair<size_t, int64_t>> neurons = {{2, 1}, {2, 5}, {0, 0}};
  for (int64_t j = 0; j < 3; ++j) {
    const auto [expert, row] = neurons[static_cast<size_t>(j)];
    const double alpha = expert == 2 ? 0.3 : kUnselectedAlpha;
    for (int64_t i = 0; i < h; ++i) {
      EXPECT_EQ(at(to.dense.gate, j, i), at(from.experts[expert].gate, row, i));
      EXPECT_EQ(at(to.dense.up, j, i), at(from.experts[expert].up, row, i));
      EXPECT_EQ(
          at(to.dense.down, i, j),
          static_cast<float>(alpha * static_cast<double>(at(from.experts[expert].down, i, row))));
    }
  }
}

}  // namespace
}  // namespace winnow
