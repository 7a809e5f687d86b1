// The calibrated sweep and the measurement of errors on the bundled tiny models.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>

#include "base/error.h"
#include "checkpoint/test_folder.h"
#include "forward/test_support.h"
#include "quantize/expert_errors.h"
#include "quantize/quantize_run.h"

namespace winnow {
namespace {

constexpr uint64_t kAmple = uint64_t{1} << 40;

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

struct Calibration {
  int64_t sequences = 40, tokens = 40;
  int threads = 1;
  bool spill = false;
  bool compensated = true;
};

fs::path Calibrate(const Model& model, const QuantizePlan& formats, const fs::path& out,
                   const Calibration& how = {}) {
  const CalibrateOptions options{.compensated = how.compensated, .memory_budget_bytes = kAmple};
  CalibratePlan plan = PlanCalibrate(model, {RandomSequences(model, how.sequences, how.tokens)},
                                     formats, options, how.threads);
  EXPECT_FALSE(plan.spill);
  plan.spill = how.spill;
  plan.prefetch = !how.spill;
  ThreadPool pool(how.threads);
  PackedCheckpointWriter writer(model, formats, out);
  const std::vector<CalibratedLayer> layers =
      RunCalibrate(model, formats, options, plan, out.string() + ".spill", writer, pool, {});
  EXPECT_EQ(layers.size(), model.config().MoeLayers().size());
  writer.Finish("card", OrderedJson::object(), {});
  return out;
}

QuantizePlan Uniform(const Model& model, const char* experts, const char* rest) {
  return UniformQuantizePlan(model, *PackedFormatFromName(experts), *PackedFormatFromName(rest));
}

std::map<std::string, std::string> FilesOf(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    files[entry.path().filename().string()] = ReadTextFile(entry.path());
  }
  return files;
}

// Squared difference of the logits, over all tokens.
double LogitError(const Model& model, const Model& rounded, int64_t sequences) {
  const SourceBlocks blocks = RandomSequences(model, sequences, 40);
  TokenSet tokens;
  tokens.AppendAll(blocks.sequences.ids, blocks.sequences.offsets);
  const std::vector<float> intact = RunForward(model, tokens, {.watch = Watch::kNobody}).logits;
  const std::vector<float> other = RunForward(rounded, tokens, {.watch = Watch::kNobody}).logits;
  double sum = 0;
  for (size_t i = 0; i < intact.size(); ++i) {
    const auto d = static_cast<double>(intact[i]) - static_cast<double>(other[i]);
    sum += d * d;
  }
  return sum;
}

TEST(Calibrated, WritesEveryFamilyCloserThanPlainRounding) {
  for (const char* name : {"mixtral", "qwen2_moe", "qwen3_moe-bf16", "olmoe", "deepseek-bf16",
                           "qwen3_moe-dense-layer", "mixtral-bf16-fused"}) {
    SCOPED_TRACE(name);
    const Model model = Model::Open(GoldenFolder(name));
    const TestFolder folder;
    const QuantizePlan formats = Uniform(model, "3bit", "4bit");
    const Model compensated = Model::Open(Calibrate(model, formats, folder.path() / "compensated"));
    ThreadPool pool(1);
    RunQuantize(model, formats, folder.path() / "plain", pool, {});
    const Model plain = Model::Open(folder.path() / "plain");
    EXPECT_LT(LogitError(model, compensated, 40), 0.95 * LogitError(model, plain, 40));
  }
}

TEST(Calibrated, TheSameBytesForAnyThreadsAndMemory) {
  const Model model = Model::Open(GoldenFolder("deepseek-bf16"));
  const TestFolder folder;
  const QuantizePlan formats = Uniform(model, "3bit-asym", "8bit");
  const auto one = FilesOf(Calibrate(model, formats, folder.path() / "one"));
  EXPECT_EQ(FilesOf(Calibrate(model, formats, folder.path() / "three", {.threads = 3})), one);
  EXPECT_EQ(FilesOf(Calibrate(model, formats, folder.path() / "spilled", {.spill = true})), one);
}

TEST(Calibrated, ExpertsWithoutTokensAreRoundedForTheMeanOfTheirLayer) {
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  const TestFolder folder;
  const QuantizePlan formats = Uniform(model, "4bit", "8bit");
  const Model rounded =
      Model::Open(Calibrate(model, formats, folder.path() / "few", {.sequences = 1, .tokens = 2}));
  ThreadPool pool(1);
  RunQuantize(model, Uniform(model, "2bit", "8bit"), folder.path() / "worse", pool, {});
  EXPECT_LT(LogitError(model, rounded, 20),
            LogitError(model, Model::Open(folder.path() / "worse"), 20));
}

TEST(Calibrated, PlansAndRefuses) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  const QuantizePlan formats = Uniform(model, "4bit", "8bit");
  const std::vector<SourceBlocks> sources = {RandomSequences(model, 4, 40)};
  const CalibrateOptions none{.memory_budget_bytes = 1000};
  EXPECT_THROW(PlanCalibrate(model, sources, formats, none, 1), ResourceError);
  const CalibrateOptions ample{.memory_budget_bytes = kAmple};
  EXPECT_THROW(PlanCalibrate(model, {}, formats, ample, 1), UsageError);
  SourceBlocks wrong = sources.front();
  wrong.sequences.ids.front() = static_cast<int32_t>(model.config().vocab_size);
  EXPECT_THROW(PlanCalibrate(model, {wrong}, formats, ample, 1), UsageError);
}

TEST(ExpertErrors, FallWithBitsAndAllocateToASize) {
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  const TestFolder folder;
  std::vector<PackedFormat> candidates;
  for (const int bits : {2, 3, 4, 6, 8}) candidates.push_back({.bits = bits});
  const QuantizePlan base = Uniform(model, "4bit", "8bit");
  const CalibrateOptions options{.memory_budget_bytes = kAmple};
  const CalibratePlan plan =
      PlanCalibrate(model, {RandomSequences(model, 40, 40)}, base, options, 1);
  ThreadPool pool(1), three(3);
  const std::vector<LayerErrors> errors =
      MeasureExpertErrors(model, candidates, options, plan, folder.path() / "spill", pool, {});
  const std::vector<LayerErrors> again =
      MeasureExpertErrors(model, candidates, options, plan, folder.path() / "spill", three, {});
  ASSERT_EQ(errors.size(), model.config().MoeLayers().size());
  for (size_t l = 0; l < errors.size(); ++l) {
    EXPECT_EQ(errors[l].error, again[l].error);
    for (const std::vector<double>& expert : errors[l].error) {
      for (size_t c = 1; c < expert.size(); ++c) EXPECT_LT(expert[c], expert[c - 1]);
    }
  }
  // As many bytes as 4 bits everywhere take.
  RunQuantize(model, base, folder.path() / "uniform", pool, {});
  uint64_t size = 0;
  for (const auto& [name, text] : FilesOf(folder.path() / "uniform")) {
    if (name.ends_with(".safetensors")) size += text.size();
  }
  size += 8192;  // what AllocateToSize keeps for headers
  Allocation allocation;
  const QuantizePlan found = AllocateToSize(model, base, candidates, errors, size, &allocation);
  EXPECT_LE(allocation.error, allocation.uniform_error);
  EXPECT_EQ(candidates[static_cast<size_t>(allocation.uniform_choice)].bits, 4);
  RunQuantize(model, found, folder.path() / "found", pool, {});
  uint64_t written = 0;
  for (const auto& [name, text] : FilesOf(folder.path() / "found")) {
    if (name.ends_with(".safetensors")) written += text.size();
  }
  EXPECT_LE(written, size);
  EXPECT_THROW(AllocateToSize(model, base, candidates, errors, 100, nullptr), UsageError);
}

TEST(ExpertErrors, WithoutTextTheyFollowUse) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  std::vector<std::vector<double>> use;
  for (const int32_t layer : model.config().MoeLayers()) {
    use.emplace_back(model.layers()[static_cast<size_t>(layer)].experts.size(), 1.0);
  }
  use[0][1] = 100;
  ThreadPool pool(1);
  const std::vector<LayerErrors> errors =
      WeightErrors(model, {{.bits = 2}, {.bits = 4}}, use, pool, {});
  ASSERT_EQ(errors.size(), use.size());
  // Relative errors of normal weights at 2 and 4 bits are about 0.11 and 0.0065, of three matrices.
  EXPECT_NEAR(errors[0].error[0][0], 0.33, 0.1);
  EXPECT_NEAR(errors[0].error[0][1], 0.02, 0.006);
  EXPECT_NEAR(errors[0].error[1][1], 2, 0.6);
}

}  // namespace
}  // namespace winnow
