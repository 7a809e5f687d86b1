// Observing runs: records and sums against the forward pass they describe; the same bytes for any
// number of threads, for merged runs and for interrupted and resumed ones.
#include <gtest/gtest.h>

#include "base/error.h"
#include "observe/observe_run.h"
#include "observe/stats_merge.h"
#include "observe/test_support.h"

namespace winnow {
namespace {

constexpr StatsLevel kLevels[] = {StatsLevel::kRouting, StatsLevel::kRouted, StatsLevel::kFull};

// The even and the odd tokens of a golden file as two texts of uneven sequences.
std::vector<SourceBlocks> TwoTexts(const std::string& name) {
  const TokenSet golden = GoldenTokens(name);
  TokenSet a, b;
  const std::span<const int32_t> ids = golden.ids;
  a.Append(ids.subspan(0, 11));
  a.Append(ids.subspan(11, 11));
  a.Append(ids.subspan(22, 2));
  b.Append(ids.subspan(24, 20));
  b.Append(ids.subspan(44, 4));
  return {SourceOf("a", a), SourceOf("b", b)};
}

TokenSet Joined(const std::vector<SourceBlocks>& sources) {
  TokenSet tokens;
  for (const SourceBlocks& source : sources) {
    for (int64_t i = 0; i < source.sequences.size(); ++i) {
      const auto begin = static_cast<size_t>(source.sequences.offsets[static_cast<size_t>(i)]);
      const auto end = static_cast<size_t>(source.sequences.offsets[static_cast<size_t>(i) + 1]);
      tokens.Append(std::span(source.sequences.ids).subspan(begin, end - begin));
    }
  }
  return tokens;
}

// A stand-in for a method: keeps the `keep` most selected experts.
ChooseSurvivors MostSelected(int64_t keep) {
  return [keep](const fs::path& folder, const StatsInfo& info, const StatsLayer& layer) {
    const std::vector<int64_t> coverage = LayerStatsReader(folder, info, layer).Coverage();
    std::vector<int32_t> kept;
    for (int32_t e = 0; e < layer.num_experts; ++e) kept.push_back(e);
    std::stable_sort(kept.begin(), kept.end(), [&](int32_t a, int32_t b) {
      return coverage[static_cast<size_t>(a)] > coverage[static_cast<size_t>(b)];
    });
    kept.resize(static_cast<size_t>(keep));
    std::sort(kept.begin(), kept.end());
    return kept;
  };
}

class ObserveTest : public testing::Test {
 protected:
  fs::path Path(const std::string& name) const { return folder_.path() / name; }
  const TestFolder folder_;
};

double Squared(const float* row, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{row[i]} * double{row[i]};
  return sum;
}

double Product(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

// f32 dot products of 64 terms against double: 1e-6 of the vectors' lengths, which are at most a
// few units here.
constexpr double kDotLimit = 1e-4;

TEST_F(ObserveTest, RecordsAreWhatTheLayerComputed) {
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  const ModelConfig& config = model.config();
  const std::vector<SourceBlocks> sources = TwoTexts("qwen2_moe");
  const TokenSet tokens = Joined(sources);
  const ForwardTrace trace = RunForward(model, tokens, {.watch = Watch::kExpertOutputs});
  Observe(model, sources, {.level = StatsLevel::kFull}, Path("stats"));
  const StatsInfo info = ReadStatsInfo(Path("stats"));
  const int64_t n = tokens.num_tokens(), h = config.hidden_size, k = config.num_experts_per_tok;
  ASSERT_EQ(info.num_tokens(), n);
  for (const StatsLayer& layer : info.layers) {
    SCOPED_TRACE(layer.layer);
    const LayerStatsReader reader(Path("stats"), info, layer);
    const SafetensorsFile& file = reader.file();
    const TracedLayer& traced = trace.layers.at(layer.layer);
    EXPECT_EQ(ReadArray<float>(file, "router_logits"), traced.router_logits);
    const std::vector<float> gram = ReadArray<float>(file, "gram");
    const std::vector<float> norms = ReadArray<float>(file, "selected_norm");
    const std::vector<float> dots = ReadArray<float>(file, "residual_dot_routed");
    const std::vector<float> residual = ReadArray<float>(file, "residual_norm_squared");
    const std::vector<float> stream = ReadArray<float>(file, "stream_norm_squared");
    size_t at = 0;
    for (int64_t t = 0; t < n; ++t) {
      const float* f = traced.expert_outputs.data() + t * layer.num_experts * h;
      for (int64_t i = 0; i < layer.num_experts; ++i) {
        for (int64_t j = i; j < layer.num_experts; ++j) {
          ASSERT_NEAR(gram[at++], Product(f + i * h, f + j * h, h), kDotLimit);
        }
      }
      for (int64_t i = 0; i < k; ++i) {
        const int64_t e = traced.topk_ids[static_cast<size_t>(t * k + i)];
        ASSERT_NEAR(norms[static_cast<size_t>(t * k + i)], std::sqrt(Squared(f + e * h, h)),
                    kDotLimit);
      }
    }
    EXPECT_EQ(at, gram.size());
    // The stream before the layer's block is the difference of what the trace holds.
    if (layer.layer == config.num_layers() - 1) {
      std::vector<float> before = trace.hidden;
      for (size_t i = 0; i < before.size(); ++i) before[i] -= traced.moe_out[i];
      for (int64_t t = 0; t < n; ++t) {
        const auto row = static_cast<size_t>(t);
        EXPECT_NEAR(residual[row], Squared(before.data() + t * h, h), kDotLimit);
        EXPECT_NEAR(stream[row], Squared(trace.hidden.data() + t * h, h), kDotLimit);
        EXPECT_NEAR(dots[row], Product(before.data() + t * h, traced.routed.data() + t * h, h),
                    kDotLimit);
      }
    }
  }
}

TEST_F(ObserveTest, SumsAreTakenBySource) {
  const Model model = Model::Open(GoldenFolder("olmoe"));
  const ModelConfig& config = model.config();
  const std::vector<SourceBlocks> sources = TwoTexts("olmoe");
  const ForwardTrace trace = RunForward(model, Joined(sources), {.watch = Watch::kExpertOutputs});
  Observe(model, sources, {.level = StatsLevel::kFull}, Path("stats"));
  const StatsInfo info = ReadStatsInfo(Path("stats"));
  const int64_t h = config.hidden_size, k = config.num_experts_per_tok;
  for (const StatsLayer& layer : info.layers) {
    const LayerStatsReader reader(Path("stats"), info, layer);
    const TracedLayer& traced = trace.layers.at(layer.layer);
    const int64_t experts = layer.num_experts;
    const auto matrix = static_cast<size_t>(experts * h);
    std::vector<int64_t> coverage(static_cast<size_t>(experts));
    int64_t t = 0;
    for (size_t s = 0; s < sources.size(); ++s) {
      std::vector<int64_t> count(static_cast<size_t>(experts));
      std::vector<double> weight(static_cast<size_t>(experts)), all(matrix), selected(matrix),
          weighted(matrix), squared(matrix);
      for (const int64_t end = t + info.sources[s].num_tokens; t < end; ++t) {
        for (int64_t e = 0; e < experts; ++e) {
          const float* f = traced.expert_outputs.data() + (t * experts + e) * h;
          double w = -1;
          for (int64_t i = 0; i < k; ++i) {
            if (traced.topk_ids[static_cast<size_t>(t * k + i)] == e) {
              w = double{traced.topk_weights[static_cast<size_t>(t * k + i)]};
            }
          }
          for (int64_t c = 0; c < h; ++c) {
            const auto at = static_cast<size_t>(e * h + c);
            const double value{f[c]};
            all[at] += value;
            if (w < 0) continue;
            selected[at] += value;
            weighted[at] += w * value;
            squared[at] += w * w * value;
          }
          if (w < 0) continue;
          ++count[static_cast<size_t>(e)];
          ++coverage[static_cast<size_t>(e)];
          weight[static_cast<size_t>(e)] += w;
        }
      }
      const std::string prefix = "sums." + std::to_string(s) + ".";
      EXPECT_EQ(ReadArray<int64_t>(reader.file(), prefix + "tokens"), count);
      EXPECT_EQ(ReadArray<double>(reader.file(), prefix + "weight"), weight);
      const auto expect_near = [&](const char* name, const std::vector<double>& sums) {
        const std::vector<double> got = ReadArray<double>(reader.file(), prefix + name);
        ASSERT_EQ(got.size(), sums.size());
        // Doubles added in the same order; only a fused multiply-add could differ.
        for (size_t i = 0; i < sums.size(); ++i) ASSERT_NEAR(got[i], sums[i], 1e-12) << name;
      };
      expect_near("output", all);
      expect_near("selected_output", selected);
      expect_near("weighted_output", weighted);
      expect_near("squared_weight_output", squared);
    }
    EXPECT_EQ(reader.Coverage(), coverage);
  }
}

// Routed statistics see the selected experts alone: the same records as full ones where both have
// them.
TEST_F(ObserveTest, LevelsAgreeOnWhatTheyShare) {
  const Model model = Model::Open(GoldenFolder("deepseek-bf16"));
  const std::vector<SourceBlocks> sources = TwoTexts("deepseek-bf16");
  for (const StatsLevel level : kLevels) {
    Observe(model, sources, {.level = level}, Path(std::string(StatsLevelName(level))));
  }
  const StatsInfo full = ReadStatsInfo(Path("full"));
  for (const StatsLevel level : {StatsLevel::kRouting, StatsLevel::kRouted}) {
    const fs::path folder = Path(std::string(StatsLevelName(level)));
    const StatsInfo info = ReadStatsInfo(folder);
    for (const StatsLayer& layer : info.layers) {
      const LayerStatsReader reader(folder, info, layer);
      const LayerStatsReader all(Path("full"), full, layer);
      for (const TensorInfo& tensor : reader.file().tensors()) {
        std::vector<std::byte> here(tensor.bytes), there(tensor.bytes);
        reader.file().Read(tensor, here);
        all.file().Read(all.file().Get(tensor.name), there);
        EXPECT_EQ(here, there) << tensor.name;
      }
    }
  }
}

TEST_F(ObserveTest, SameBytesForAnyNumberOfThreadsAndAnyPlan) {
  for (const char* name : {"mixtral-bf16-fused", "deepseek-bf16", "qwen3_moe-dense-layer"}) {
    const Model model = Model::Open(GoldenFolder(name));
    const std::vector<SourceBlocks> sources = TwoTexts(name);
    for (const StatsLevel level : kLevels) {
      const ObserveOptions options{.level = level, .memory_budget_bytes = kAmpleBytes};
      Observe(model, sources, options, Path("one"));
      for (const int threads : {2, 3}) {
        Observe(model, sources, options, Path("other"), threads);
        ExpectSameContent(Path("one"), Path("other"));
      }
      ThreadPool pool(2);
      ObservePlan plan = PlanObserve(model, sources, options, 2);
      plan.prefetch = false;
      plan.spill = true;
      RunObserve(model, sources, options, plan, Path("other"), pool, {});
      ExpectSameContent(Path("one"), Path("other"));
    }
  }
}

TEST_F(ObserveTest, OneRunOverTwoTextsIsTheMergeOfTwoRuns) {
  const Model model = Model::Open(GoldenFolder("olmoe"));
  const std::vector<SourceBlocks> sources = TwoTexts("olmoe");
  for (const StatsLevel level : kLevels) {
    SCOPED_TRACE(StatsLevelName(level));
    const ObserveOptions options{.level = level, .batch = 2};
    Observe(model, sources, options, Path("together"));
    Observe(model, {sources[0]}, options, Path("a"));
    Observe(model, {sources[1]}, options, Path("b"));
    MergeStats({Path("a"), Path("b")}, Path("merged"), {});
    ExpectSameContent(Path("together"), Path("merged"));
    EXPECT_EQ(ReadStatsInfo(Path("merged")).BatchTokens(), (std::vector<int64_t>{22, 2, 24}));
    // Merging is associative: parts that are merges themselves.
    MergeStats({Path("b"), Path("a")}, Path("swapped"), {});
    EXPECT_EQ(ReadStatsInfo(Path("swapped")).sources[0].name, "b");
  }
}

TEST_F(ObserveTest, MergeRefusesWhatDoesNotBelongTogether) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const std::vector<SourceBlocks> sources = TwoTexts("mixtral");
  const ObserveOptions routed{.level = StatsLevel::kRouted};
  Observe(model, {sources[0]}, routed, Path("a"));
  Observe(model, {sources[1]}, routed, Path("b"));
  Observe(model, {sources[1]}, {.level = StatsLevel::kRouting}, Path("level"));
  Observe(model, {sources[1]}, {.level = StatsLevel::kRouted, .batch = 3}, Path("batch"));
  Observe(Model::Open(GoldenFolder("mixtral-bf16-fused")), {sources[1]}, routed, Path("model"));
  Observe(model, {sources[1]},
          {.level = StatsLevel::kFull, .progressive_keep = 4, .choose = MostSelected(4)},
          Path("progressive"));
  for (const char* other : {"a", "level", "batch", "model", "progressive"}) {
    EXPECT_THROW(MergeStats({Path("a"), Path(other)}, Path("out"), {}), UsageError) << other;
    EXPECT_THROW(MergeStats({Path(other), Path("a")}, Path("out"), {}), UsageError) << other;
  }
  EXPECT_FALSE(fs::exists(Path("out")));
  EXPECT_NO_THROW(MergeStats({Path("a"), Path("b")}, Path("out"), {}));
}

// Interrupts a run when `event` progress events have come, resumes it, and compares the result.
class InterruptTest : public ObserveTest {
 protected:
  // False if the run ended before that event.
  bool InterruptAndResume(const Model& model, const std::vector<SourceBlocks>& sources,
                          ObserveOptions options, int event) {
    const fs::path output = Path("resumed");
    fs::remove_all(output);
    fs::remove_all(Path("resumed.partial"));
    std::atomic<bool> interrupted = false;
    int seen = 0;
    JobControl control;
    control.interrupted = &interrupted;
    control.on_progress = [&](const ProgressEvent&) { interrupted = ++seen >= event; };
    try {
      Observe(model, sources, options, output, 2, control);
      return false;
    } catch (const InterruptedError&) {
    }
    EXPECT_FALSE(fs::exists(output));
    options.resume = true;
    const ObserveResult result = Observe(model, sources, options, output);
    EXPECT_FALSE(fs::exists(Path("resumed.partial")));
    resumed_layers_.push_back(result.resumed_layers);
    ExpectSameContent(Path("whole"), output);
    return true;
  }
  std::vector<int64_t> resumed_layers_;
};

TEST_F(InterruptTest, ResumedRunsWriteTheSameBytes) {
  for (const char* name : {"qwen2_moe", "qwen3_moe-dense-layer"}) {
    const Model model = Model::Open(GoldenFolder(name));
    const std::vector<SourceBlocks> sources = TwoTexts(name);
    for (const StatsLevel level : kLevels) {
      const ObserveOptions options{.level = level, .checkpoint_seconds = 0};
      Observe(model, sources, options, Path("whole"));
      int event = 1;
      resumed_layers_.clear();
      while (InterruptAndResume(model, sources, options, event)) ++event;
      EXPECT_EQ(resumed_layers_, (std::vector<int64_t>{1, 2})) << name;
    }
  }
}

TEST_F(InterruptTest, ResumedProgressiveRunsWriteTheSameBytes) {
  for (const char* name : {"olmoe", "qwen3_moe-dense-layer"}) {
    const Model model = Model::Open(GoldenFolder(name));
    const std::vector<SourceBlocks> sources = TwoTexts(name);
    const ObserveOptions options{.level = StatsLevel::kFull,
                                 .progressive_keep = 4,
                                 .choose = MostSelected(4),
                                 .checkpoint_seconds = 0};
    Observe(model, sources, options, Path("whole"));
    int event = 1;
    resumed_layers_.clear();
    while (InterruptAndResume(model, sources, options, event)) ++event;
    // Two events a layer: one for each stream.
    EXPECT_EQ(resumed_layers_, (std::vector<int64_t>{0, 1, 1, 2, 2})) << name;
  }
}

// With two tiles a layer may stop half-way; without saved streams a run starts again.
TEST_F(InterruptTest, StopsBetweenTiles) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const std::vector<int32_t> ids = GoldenTokens("mixtral").ids;
  TokenSet tokens;
  while (tokens.num_tokens() < kTileTokens + 1) tokens.Append(ids);
  const std::vector<SourceBlocks> sources = {SourceOf("long", tokens)};
  ObserveOptions options{.level = StatsLevel::kRouted, .checkpoint_seconds = 0};
  Observe(model, sources, options, Path("whole"));
  for (const int event : {1, 4}) EXPECT_TRUE(InterruptAndResume(model, sources, options, event));
  EXPECT_EQ(resumed_layers_, (std::vector<int64_t>{0, 2}));
  options.checkpoint_seconds = 1e9;
  EXPECT_TRUE(InterruptAndResume(model, sources, options, 5));
  EXPECT_EQ(resumed_layers_.back(), 0);
}

TEST_F(ObserveTest, ResumingSomethingElseIsRefused) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const std::vector<SourceBlocks> sources = TwoTexts("mixtral");
  const ObserveOptions options{.level = StatsLevel::kRouted, .checkpoint_seconds = 0};
  const auto interrupt = [&] {
    std::atomic<bool> interrupted = false;
    JobControl control;
    control.interrupted = &interrupted;
    control.on_progress = [&](const ProgressEvent& event) { interrupted = event.layer == 0; };
    EXPECT_THROW(Observe(model, sources, options, Path("out"), 1, control), InterruptedError);
  };
  interrupt();
  const fs::path stream = Path("out.partial") / "stream-0001.f32";
  ASSERT_TRUE(fs::exists(stream));
  ObserveOptions other = options;
  other.resume = true;
  EXPECT_THROW(Observe(model, {sources[0]}, other, Path("out")), UsageError);
  EXPECT_THROW(Observe(model, {sources[1], sources[0]}, other, Path("out")), UsageError);
  EXPECT_THROW(
      Observe(Model::Open(GoldenFolder("mixtral-bf16-sharded")), sources, other, Path("out")),
      UsageError);
  other.batch = 3;
  EXPECT_THROW(Observe(model, sources, other, Path("out")), UsageError);
  other = options;
  other.resume = true;
  other.kept_experts = {{0, 1, 2}};
  EXPECT_THROW(Observe(model, sources, other, Path("out")), UsageError);
  other.kept_experts.clear();
  // A damaged stream is noticed, not computed with.
  fs::resize_file(stream, 100);
  EXPECT_THROW(Observe(model, sources, other, Path("out")), ModelError);
  WriteFileAtomically(Path("out.partial") / "progress.json", "{}");
  EXPECT_THROW(Observe(model, sources, other, Path("out")), ModelError);
  // Without resume the run starts afresh.
  EXPECT_NO_THROW(Observe(model, sources, options, Path("out")));
}

TEST_F(ObserveTest, PlansWithinTheBudget) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  TokenSet tokens;
  const std::vector<int32_t> ids = GoldenTokens("mixtral").ids;
  while (tokens.num_tokens() < 3 * kTileTokens) tokens.Append(ids);
  const std::vector<SourceBlocks> sources = {SourceOf("long", tokens)};
  const auto plan = [&](uint64_t budget) {
    return PlanObserve(model, sources,
                       {.level = StatsLevel::kRouted, .memory_budget_bytes = budget}, 1);
  };
  const ObservePlan ample = plan(kAmpleBytes);
  EXPECT_TRUE(ample.prefetch);
  EXPECT_FALSE(ample.spill);
  const ObservePlan less = plan(ample.memory.total_bytes() - 1);
  EXPECT_FALSE(less.prefetch && !less.spill);
  EXPECT_LT(less.memory.total_bytes(), ample.memory.total_bytes());
  ObservePlan least = less;
  try {
    for (;;) least = plan(least.memory.total_bytes() - 1);
  } catch (const ResourceError& e) {
    // The smallest budget that works is named with the table.
    EXPECT_NE(std::string(e.what()).find("hidden states"), std::string::npos) << e.what();
  }
  EXPECT_FALSE(least.prefetch);
  EXPECT_TRUE(least.spill);
  EXPECT_NO_THROW(plan(least.memory.total_bytes()));
  EXPECT_EQ(ample.stats_bytes, StatsBytes(ample.info));
}

TEST_F(ObserveTest, StatsBytesIsWhatIsWritten) {
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  for (const StatsLevel level : kLevels) {
    Observe(model, TwoTexts("qwen2_moe"), {.level = level}, Path("stats"));
    const StatsInfo info = ReadStatsInfo(Path("stats"));
    uint64_t bytes = 0;
    for (const StatsLayer& layer : info.layers) {
      bytes += fs::file_size(LayerStatsPath(Path("stats"), layer.layer));
    }
    EXPECT_EQ(StatsBytes(info), bytes);
  }
}

TEST_F(ObserveTest, RefusesNothingToObserve) {
  EXPECT_THROW(Observe(Model::Open(GoldenFolder("mixtral")), {SourceOf("empty", TokenSet{})}, {},
                       Path("out")),
               UsageError);
  EXPECT_FALSE(fs::exists(Path("out.partial")));
}

}  // namespace
}  // namespace winnow
