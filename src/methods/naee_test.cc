// NAEE against the losses and choices of the published program, and against the definition: the
// router cut by hand and the norm of what changes.
#include "methods/naee.h"

#include <gtest/gtest.h>

#include <numeric>

#include "methods/naee_search.h"
#include "observe/test_support.h"

namespace winnow {
namespace {

using Subset = std::vector<int32_t>;

// The published program computes in f32; its losses differ from f64 by 7e-8 relative.
constexpr double kLossLimit = 1e-5;
// Closer candidates may come out either way.
constexpr double kDecidedMargin = 1e-4;

Json Published() {
  const fs::path path = fs::path(WINNOW_TEST_DATA) / "naee" / "naee.json";
  return ParseJson(ReadTextFile(path), path.string());
}

// Blocks the published program made of its texts.
std::vector<SourceBlocks> PublishedBlocks(const std::string& model) {
  const SafetensorsFile file =
      SafetensorsFile::Open(fs::path(WINNOW_TEST_DATA) / "text" / "naee-ids.safetensors");
  return {SourceOf(
      "mix", TokensOf(ReadIntegers(file, model), static_cast<int64_t>(file.Get(model).shape[0])))};
}

LayerPlan Choose(const fs::path& stats, const StatsLayer& layer, int64_t keep, int threads = 1) {
  const StatsInfo info = ReadStatsInfo(stats);
  ThreadPool pool(threads);
  return ChooseNaee(LayerStatsReader(stats, info, layer), info, layer, {.keep = keep}, pool, {});
}

// `i` counts MoE layers.
void ExpectPublishedChoice(const LayerPlan& got, const Json& expected, size_t i) {
  const Json& chosen = expected.at("chosen").at(i);
  const auto loss = chosen.at("loss").get<double>();
  const auto margin = chosen.at("margin").get<double>();
  ASSERT_TRUE(got.loss.has_value() && got.margin.has_value());
  EXPECT_NEAR(*got.loss, loss, loss * kLossLimit);
  EXPECT_NEAR(*got.margin, margin, 2 * kLossLimit * (1 + margin));
  if (margin > kDecidedMargin) {
    EXPECT_EQ(got.dropped, chosen.at("drop").get<Subset>());
  }
  // The same through the table of all subsets.
  const auto drops = expected.at("drop").get<std::vector<Subset>>();
  const auto losses = expected.at("loss").at(i).get<std::vector<double>>();
  const auto at = std::find(drops.begin(), drops.end(), got.dropped);
  ASSERT_NE(at, drops.end());
  EXPECT_NEAR(*got.loss, losses[static_cast<size_t>(at - drops.begin())], loss * kLossLimit);
}

TEST(NaeePublished, TinyModelEveryKeepAndBatch) {
  const Model model = Model::Open(fs::path(WINNOW_TEST_DATA) / "naee" / "tiny");
  const Json published = Published().at("tiny");
  const TestFolder folder;
  const fs::path stats = folder.path() / "stats";
  Observe(model, PublishedBlocks("tiny"),
          {.level = StatsLevel::kFull, .batch = published.at("batch").get<int64_t>()}, stats, 2);
  StatsInfo info = ReadStatsInfo(stats);
  const LayerStatsReader records(stats, info, info.layers[0]);
  ThreadPool pool(2);
  const auto choose = [&](int64_t keep) {
    return ChooseNaee(records, info, info.layers[0], {.keep = keep}, pool, {});
  };
  for (int64_t keep = 2; keep <= 7; ++keep) {
    SCOPED_TRACE(keep);
    ExpectPublishedChoice(choose(keep), published.at("layerwise").at("keep" + std::to_string(keep)),
                          0);
  }
  // The same tokens in other batches: other sums of norms.
  for (const int64_t batch : {8, 16}) {
    SCOPED_TRACE(batch);
    Json expected = published.at("batch_variants").at("batch" + std::to_string(batch) + ".keep4");
    expected["drop"] = published.at("layerwise").at("keep4").at("drop");
    info.batch = batch;
    ExpectPublishedChoice(choose(4), expected, 0);
  }
}

// The bundled model's first two layers: the others would only take time, as all of them do under a
// sanitizer.
class NaeeSample : public testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "13 GFLOP a layer; the tiny model takes the same paths";
#endif
    const fs::path source = fs::path(WINNOW_SOURCE_DIR) / "examples" / "sample-mixtral";
    fs::create_symlink(source / "model.safetensors", folder_.path() / "model.safetensors");
    fs::copy_file(source / "config.json", folder_.path() / "config.json");
    EditConfig(folder_.path(), [](OrderedJson& config) { config["num_hidden_layers"] = 2; });
    model_.emplace(Model::Open(folder_.path()));
    published_ = Published().at("sample");
  }
  ObserveOptions Options() const {
    return {.level = StatsLevel::kFull, .batch = published_.at("batch").get<int64_t>()};
  }
  const TestFolder folder_;
  const fs::path stats_ = folder_.path() / "stats";
  std::optional<Model> model_;
  Json published_;
};

TEST_F(NaeeSample, Layerwise) {
  Observe(*model_, PublishedBlocks("sample"), Options(), stats_, 2);
  const StatsInfo info = ReadStatsInfo(stats_);
  for (const int64_t keep : {4, 6}) {
    for (size_t i = 0; i < info.layers.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "keep " << keep << " layer " << i);
      ExpectPublishedChoice(Choose(stats_, info.layers[i], keep, 2),
                            published_.at("layerwise").at("keep" + std::to_string(keep)), i);
    }
  }
}

TEST_F(NaeeSample, Progressive) {
  ObserveOptions options = Options();
  options.progressive_keep = 4;
  size_t i = 0;
  ThreadPool pool(2);
  options.choose = [&](const fs::path& folder, const StatsInfo& info, const StatsLayer& layer) {
    const LayerPlan plan =
        ChooseNaee(LayerStatsReader(folder, info, layer), info, layer, {.keep = 4}, pool, {});
    ExpectPublishedChoice(plan, published_.at("progressive").at("keep4"), i++);
    return plan.kept;
  };
  Observe(*model_, PublishedBlocks("sample"), options, stats_, 2);
  EXPECT_EQ(i, 2u);
}

// What the layer computes for one token with only `kept`, from the expert outputs and router
// scores of all experts: rows of the router deleted, then softmax, top k, weights. In double.
std::vector<double> RoutedWith(const ModelConfig& config, const TracedLayer& layer, int64_t experts,
                               int64_t token, Subset kept) {
  const float* logits = layer.router_logits.data() + token * experts;
  const auto k = config.num_experts_per_tok;
  std::stable_sort(kept.begin(), kept.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  double all = 0, selected = 0;
  for (size_t i = 0; i < kept.size(); ++i) {
    const double mass = std::exp(static_cast<double>(logits[kept[i]]));
    all += mass;
    if (i < static_cast<size_t>(k)) selected += mass;
  }
  const double total = config.norm_topk_prob ? selected + config.normalize_epsilon * all : all;
  const int64_t h = config.hidden_size;
  std::vector<double> sum(static_cast<size_t>(h));
  for (int64_t i = 0; i < k; ++i) {
    const int32_t e = kept[static_cast<size_t>(i)];
    const double weight = std::exp(static_cast<double>(logits[e])) / total;
    const float* output = layer.expert_outputs.data() + (token * experts + e) * h;
    for (int64_t c = 0; c < h; ++c) sum[static_cast<size_t>(c)] += weight * double{output[c]};
  }
  return sum;
}

Subset AllExperts(int64_t experts) {
  Subset all(static_cast<size_t>(experts));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// Every subset with its loss by definition. `target` is the layer whose routed output counts, which
// is `layer` itself but for progressive runs.
std::map<Subset, double> LossesByDefinition(const ModelConfig& config, const TracedLayer& layer,
                                            const TracedLayer& target, int64_t experts,
                                            int64_t keep, const std::vector<int64_t>& batches) {
  std::map<Subset, double> losses;
  for (uint32_t mask = 0; mask < (1u << experts); ++mask) {
    if (__builtin_popcount(mask) != static_cast<int>(experts - keep)) continue;
    Subset kept, dropped;
    for (int32_t e = 0; e < experts; ++e) {
      (((mask >> e) & 1u) != 0 ? dropped : kept).push_back(e);
    }
    double loss = 0;
    int64_t token = 0;
    for (const int64_t batch : batches) {
      double squares = 0;
      for (const int64_t end = token + batch; token < end; ++token) {
        const std::vector<double> z =
            RoutedWith(config, target, experts, token, AllExperts(experts));
        const std::vector<double> cut = RoutedWith(config, layer, experts, token, kept);
        for (size_t c = 0; c < z.size(); ++c) squares += (z[c] - cut[c]) * (z[c] - cut[c]);
      }
      loss += std::sqrt(squares);
    }
    losses[dropped] = loss;
  }
  return losses;
}

void ExpectBestOf(const std::map<Subset, double>& losses, const LayerPlan& plan) {
  std::vector<double> sorted;
  for (const auto& [dropped, loss] : losses) sorted.push_back(loss);
  std::sort(sorted.begin(), sorted.end());
  EXPECT_NEAR(*plan.loss, sorted[0], kLossLimit * sorted[0]);
  EXPECT_NEAR(losses.at(plan.dropped), sorted[0], kLossLimit * sorted[0]);
  EXPECT_NEAR(*plan.margin, (sorted[1] - sorted[0]) / sorted[0], 4 * kLossLimit);
  Subset all = plan.kept;
  all.insert(all.end(), plan.dropped.begin(), plan.dropped.end());
  std::sort(all.begin(), all.end());
  EXPECT_EQ(all, AllExperts(plan.num_experts));
}

class NaeeDefinition : public testing::TestWithParam<const char*> {
 protected:
  const Model model_ = Model::Open(GoldenFolder(GetParam()));
  const TokenSet tokens_ = GoldenTokens(GetParam());
  const std::vector<SourceBlocks> sources_ = {SourceOf("golden", tokens_)};
  const TestFolder folder_;
  const fs::path stats_ = folder_.path() / "stats";
};

TEST_P(NaeeDefinition, GramIdentityIsTheNormOfTheChange) {
  const ModelConfig& config = model_.config();
  const ForwardTrace trace =
      RunForward(model_, tokens_, {.watch = Watch::kExpertOutputs, .logits = false});
  Observe(model_, sources_, {.level = StatsLevel::kFull, .batch = 1}, stats_);
  const StatsInfo info = ReadStatsInfo(stats_);
  ASSERT_EQ(info.BatchTokens(), (std::vector<int64_t>{24, 24}));
  for (const StatsLayer& layer : info.layers) {
    const TracedLayer& traced = trace.layers.at(layer.layer);
    for (int64_t keep = config.num_experts_per_tok; keep < layer.num_experts; ++keep) {
      SCOPED_TRACE(testing::Message() << "layer " << layer.layer << " keep " << keep);
      ExpectBestOf(
          LossesByDefinition(config, traced, traced, layer.num_experts, keep, info.BatchTokens()),
          Choose(stats_, layer, keep));
    }
  }
}

// Elimination and exchanges: the loss they report is that of their set by definition, the next one
// is that of a set one exchange away, and on these few experts they are never far from the best.
TEST_P(NaeeDefinition, EliminationIsNearTheBest) {
  const ModelConfig& config = model_.config();
  const ForwardTrace trace =
      RunForward(model_, tokens_, {.watch = Watch::kExpertOutputs, .logits = false});
  Observe(model_, sources_, {.level = StatsLevel::kFull, .batch = 1}, stats_);
  const StatsInfo info = ReadStatsInfo(stats_);
  ThreadPool pool(1), threads(3);
  for (const StatsLayer& layer : info.layers) {
    const TracedLayer& traced = trace.layers.at(layer.layer);
    const LayerStatsReader records(stats_, info, layer);
    for (int64_t keep = config.num_experts_per_tok; keep < layer.num_experts; ++keep) {
      SCOPED_TRACE(testing::Message() << "layer " << layer.layer << " keep " << keep);
      const std::map<Subset, double> losses =
          LossesByDefinition(config, traced, traced, layer.num_experts, keep, info.BatchTokens());
      NaeeOptions options{.keep = keep, .search = SubsetSearch::kEliminate};
      const LayerPlan plan = ChooseNaee(records, info, layer, options, pool, {});
      ASSERT_EQ(std::ssize(plan.kept), keep);
      EXPECT_NEAR(*plan.loss, losses.at(plan.dropped), kLossLimit * *plan.loss);
      double best = *plan.loss, next = std::numeric_limits<double>::infinity();
      for (const auto& [dropped, loss] : losses) {
        best = std::min(best, loss);
        Subset both;
        std::set_intersection(dropped.begin(), dropped.end(), plan.dropped.begin(),
                              plan.dropped.end(), std::back_inserter(both));
        if (both.size() + 1 == dropped.size()) next = std::min(next, loss);
      }
      EXPECT_LE(*plan.loss, 1.01 * best);
      EXPECT_NEAR(*plan.margin, (next - *plan.loss) / *plan.loss, 4 * kLossLimit);
      // Records in memory instead of read for every step; several threads.
      options.memory_budget_bytes = uint64_t{1} << 30;
      const LayerPlan again = ChooseNaee(records, info, layer, options, threads, {});
      EXPECT_EQ(again.kept, plan.kept);
      EXPECT_EQ(again.loss, plan.loss);
      EXPECT_EQ(again.margin, plan.margin);
    }
  }
}

// The other objectives, of the sets that both searches choose, against the definition.
TEST_P(NaeeDefinition, OtherObjectivesWeighTokensAsTheySay) {
  const ModelConfig& config = model_.config();
  const ForwardTrace trace =
      RunForward(model_, tokens_, {.watch = Watch::kExpertOutputs, .logits = false});
  Observe(model_, sources_, {.level = StatsLevel::kFull, .batch = 1}, stats_);
  const StatsInfo info = ReadStatsInfo(stats_);
  ThreadPool pool(1);
  for (const StatsLayer& layer : info.layers) {
    const TracedLayer& traced = trace.layers.at(layer.layer);
    const LayerStatsReader records(stats_, info, layer);
    TokenRecords all;
    records.ReadTokens(0, tokens_.num_tokens(), all);
    const int64_t keep = std::max(config.num_experts_per_tok, layer.num_experts - 2);
    if (keep == layer.num_experts) continue;
    for (const NaeeObjective objective :
         {NaeeObjective::kSquared, NaeeObjective::kOutput, NaeeObjective::kStream}) {
      SCOPED_TRACE(testing::Message() << layer.layer << " " << NaeeObjectiveName(objective));
      std::vector<double> losses;
      for (const SubsetSearch search : {SubsetSearch::kEnumerate, SubsetSearch::kEliminate}) {
        const LayerPlan plan =
            ChooseNaee(records, info, layer,
                       {.keep = keep, .search = search, .objective = objective}, pool, {});
        double expected = 0;
        for (int64_t t = 0; t < tokens_.num_tokens(); ++t) {
          const auto z =
              RoutedWith(config, traced, layer.num_experts, t, AllExperts(layer.num_experts));
          const auto cut = RoutedWith(config, traced, layer.num_experts, t, plan.kept);
          double error = 0, output = 0;
          for (size_t c = 0; c < z.size(); ++c) {
            error += (z[c] - cut[c]) * (z[c] - cut[c]);
            output += z[c] * z[c];
          }
          if (objective == NaeeObjective::kOutput) error /= output;
          if (objective == NaeeObjective::kStream) {
            error /= static_cast<double>(all.stream_norm_squared[static_cast<size_t>(t)]);
          }
          expected += error;
        }
        EXPECT_NEAR(*plan.loss, expected, 2 * kLossLimit * expected);
        losses.push_back(*plan.loss);
      }
      EXPECT_GE(losses[1], losses[0] * (1 - 1e-9));
      EXPECT_LE(losses[1], losses[0] * 1.01);
    }
  }
}

// One curve answers every number of survivors as single searches do, nested or bettered.
TEST_P(NaeeDefinition, TheCurveHoldsEveryNumberOfSurvivors) {
  Observe(model_, sources_, {.level = StatsLevel::kFull, .batch = 1}, stats_);
  const StatsInfo info = ReadStatsInfo(stats_);
  const StatsLayer& layer = info.layers.front();
  const LayerStatsReader records(stats_, info, layer);
  ThreadPool pool(1);
  const int64_t least = info.num_experts_per_tok;
  const auto curve = NaeeCurve(records, info, layer, {NaeeObjective::kStream}, least, pool, {});
  ASSERT_EQ(std::ssize(curve), layer.num_experts - least);
  double before = 0;
  for (size_t i = 0; i < curve.size(); ++i) {
    const int64_t keep = layer.num_experts - 1 - static_cast<int64_t>(i);
    ASSERT_EQ(std::ssize(curve[i].kept), keep);
    EXPECT_GE(curve[i].loss, before);
    before = curve[i].loss;
    const LayerPlan single = ChooseNaee(
        records, info, layer,
        {.keep = keep, .search = SubsetSearch::kEnumerate, .objective = NaeeObjective::kStream},
        pool, {});
    EXPECT_LE(curve[i].loss, 1.01 * *single.loss);
  }
}

// The loss is what running the pruned layer shows.
TEST_P(NaeeDefinition, LossIsWhatThePrunedLayerDoes) {
  const ModelConfig& config = model_.config();
  Observe(model_, sources_, {.level = StatsLevel::kFull, .batch = 8}, stats_);
  const StatsLayer layer = ReadStatsInfo(stats_).layers.front();
  const LayerPlan plan = Choose(stats_, layer, config.num_experts_per_tok);
  std::vector<Subset> kept(static_cast<size_t>(config.num_layers()));
  kept[static_cast<size_t>(layer.layer)] = plan.kept;
  const std::vector<float> intact = RunForward(model_, tokens_).layers.at(layer.layer).routed;
  const std::vector<float> pruned =
      RunForward(model_, tokens_, {.kept_experts = kept}).layers.at(layer.layer).routed;
  double squares = 0;
  for (size_t i = 0; i < intact.size(); ++i) {
    const double d = static_cast<double>(intact[i]) - static_cast<double>(pruned[i]);
    squares += d * d;
  }
  EXPECT_NEAR(*plan.loss, std::sqrt(squares), kLossLimit * *plan.loss);
}

// Progressive: inputs from the model pruned so far, targets from the intact one.
TEST_P(NaeeDefinition, ProgressiveFollowsThePrunedStream) {
  const ModelConfig& config = model_.config();
  const int64_t keep = config.num_experts_per_tok + 1;
  const ForwardTrace intact =
      RunForward(model_, tokens_, {.watch = Watch::kExpertOutputs, .logits = false});
  std::vector<Subset> kept(static_cast<size_t>(config.num_layers()));
  ThreadPool pool(1);
  const auto choose = [&](const fs::path& folder, const StatsInfo& info, const StatsLayer& layer) {
    const LayerPlan plan =
        ChooseNaee(LayerStatsReader(folder, info, layer), info, layer, {.keep = keep}, pool, {});
    const ForwardTrace drifted = RunForward(
        model_, tokens_, {.watch = Watch::kExpertOutputs, .kept_experts = kept, .logits = false});
    SCOPED_TRACE(testing::Message() << "layer " << layer.layer);
    ExpectBestOf(
        LossesByDefinition(config, drifted.layers.at(layer.layer), intact.layers.at(layer.layer),
                           layer.num_experts, keep, info.BatchTokens()),
        plan);
    const LayerPlan eliminated =
        ChooseNaee(LayerStatsReader(folder, info, layer), info, layer,
                   {.keep = keep, .search = SubsetSearch::kEliminate}, pool, {});
    EXPECT_LE(*eliminated.loss, 1.01 * *plan.loss);
    EXPECT_GE(*eliminated.loss, (1 - kLossLimit) * *plan.loss);
    kept[static_cast<size_t>(layer.layer)] = plan.kept;
    return plan.kept;
  };
  Observe(model_, sources_,
          {.level = StatsLevel::kFull, .batch = 1, .progressive_keep = keep, .choose = choose},
          stats_);
  for (const int32_t layer : config.MoeLayers()) {
    EXPECT_EQ(static_cast<int64_t>(kept[static_cast<size_t>(layer)].size()), keep);
  }
}

// The target that repairs drift: h'* - h - s, from the intact and the pruned model's streams.
TEST_P(NaeeDefinition, RepairingDriftAimsAtTheIntactStream) {
  const ModelConfig& config = model_.config();
  const int64_t keep = config.num_experts_per_tok + 1, h = config.hidden_size;
  const ForwardTrace intact = RunForward(model_, tokens_, {.logits = false});
  std::vector<Subset> kept(static_cast<size_t>(config.num_layers()));
  ThreadPool pool(1);
  const auto choose = [&](const fs::path& folder, const StatsInfo& info, const StatsLayer& layer) {
    const LayerStatsReader records(folder, info, layer);
    const LayerPlan plan = ChooseNaee(records, info, layer, {.keep = keep}, pool, {});
    const ForwardTrace trace = RunForward(model_, tokens_, {.kept_experts = kept, .logits = false});
    const TracedLayer& now = trace.layers.at(layer.layer);
    const TracedLayer& before = intact.layers.at(layer.layer);
    TokenRecords batch;
    records.ReadTokens(0, tokens_.num_tokens(), batch);
    for (int64_t t = 0; t < tokens_.num_tokens(); ++t) {
      double squares = 0;
      for (auto i = static_cast<size_t>(t * h); i < static_cast<size_t>((t + 1) * h); ++i) {
        const double shared =
            static_cast<double>(now.moe_out[i]) - static_cast<double>(now.routed[i]);
        const double target = static_cast<double>(before.residual[i]) +
                              static_cast<double>(before.moe_out[i]) -
                              static_cast<double>(now.residual[i]) - shared;
        squares += target * target;
      }
      // f32 sums of streams some times larger than the target.
      EXPECT_NEAR(static_cast<double>(batch.target_norm_squared[static_cast<size_t>(t)]), squares,
                  1e-4 * squares + 1e-5);
    }
    kept[static_cast<size_t>(layer.layer)] = plan.kept;
    return plan.kept;
  };
  Observe(model_, sources_,
          {.level = StatsLevel::kFull,
           .batch = 1,
           .progressive_keep = keep,
           .progressive_target = ProgressiveTarget::kRepairDrift,
           .choose = choose},
          stats_);
  EXPECT_EQ(ReadStatsInfo(stats_).progressive_target, ProgressiveTarget::kRepairDrift);
}

INSTANTIATE_TEST_SUITE_P(, NaeeDefinition,
                         testing::Values("mixtral", "qwen2_moe", "qwen3_moe-dense-layer", "olmoe",
                                         "deepseek-bf16"),
                         TestName);

TEST(Naee, SameChoiceForAnyNumberOfThreads) {
  const TestFolder folder;
  const Model model = Model::Open(GoldenFolder("olmoe"));
  Observe(model, {SourceOf("golden", GoldenTokens("olmoe"))}, {.level = StatsLevel::kFull},
          folder.path() / "stats");
  for (const StatsLayer& layer : ReadStatsInfo(folder.path() / "stats").layers) {
    const LayerPlan one = Choose(folder.path() / "stats", layer, 4);
    const LayerPlan three = Choose(folder.path() / "stats", layer, 4, 3);
    EXPECT_EQ(one.kept, three.kept);
    EXPECT_EQ(one.loss, three.loss);
    EXPECT_EQ(one.margin, three.margin);
  }
}

TEST(Naee, BinomialCoefficients) {
  EXPECT_EQ(BinomialCoefficient(8, 4), 70u);
  EXPECT_EQ(BinomialCoefficient(16, 3), 560u);
  EXPECT_EQ(BinomialCoefficient(5, 0), 1u);
  EXPECT_EQ(BinomialCoefficient(5, 5), 1u);
  EXPECT_EQ(BinomialCoefficient(5, 6), 0u);
  EXPECT_EQ(BinomialCoefficient(0, 0), 1u);
  EXPECT_EQ(BinomialCoefficient(60, 30), 118264581564861424u);
  EXPECT_EQ(BinomialCoefficient(256, 128), UINT64_MAX);
}

StatsInfo Info(int64_t experts, int64_t k) {
  StatsInfo info;
  info.num_experts_per_tok = k;
  info.level = StatsLevel::kFull;
  info.layers = {{0, experts, 1}, {1, experts, 1}};
  return info;
}

TEST(Naee, RefusesWhatItCannotAnswer) {
  EXPECT_NO_THROW(CheckNaee(Info(8, 2), {.keep = 2}));
  EXPECT_NO_THROW(CheckNaee(Info(8, 2), {.keep = 7}));
  EXPECT_THROW(CheckNaee(Info(8, 2), {.keep = 1}), UsageError);  // fewer than each token uses
  EXPECT_THROW(CheckNaee(Info(8, 2), {.keep = 8}), UsageError);  // nothing to drop
  EXPECT_NO_THROW(CheckNaee(Info(16, 4), {.keep = 12}));         // 1,820 subsets
  EXPECT_NO_THROW(CheckNaee(Info(16, 4), {.keep = 8}));          // 12,870 subsets: eliminates
  EXPECT_THROW(CheckNaee(Info(16, 4), {.keep = 8, .search = SubsetSearch::kEnumerate}), UsageError);
  EXPECT_NO_THROW(CheckNaee(Info(256, 8), {.keep = 128}));  // more than 64 bits count
  EXPECT_THROW(CheckNaee(Info(512, 200), {.keep = 511}),
               UsageError);  // k beyond what tokens are ranked by
  for (const StatsLevel level : {StatsLevel::kRouting, StatsLevel::kRouted}) {
    StatsInfo info = Info(8, 2);
    info.level = level;
    EXPECT_THROW(CheckNaee(info, {.keep = 4}), UsageError);
  }
  StatsInfo progressive = Info(8, 2);
  progressive.progressive_keep = 4;
  EXPECT_NO_THROW(CheckNaee(progressive, {.keep = 4}));
  EXPECT_THROW(CheckNaee(progressive, {.keep = 6}), UsageError);
}

}  // namespace
}  // namespace winnow
