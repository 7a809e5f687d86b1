// Health checks name what is wrong with a model, and nothing in a good one.
#include "doctor/health.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "observe/test_support.h"
#include "plan/compression_plan.h"

namespace winnow {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

const fs::path kExamples = fs::path(WINNOW_SOURCE_DIR) / "examples";
constexpr char kExpert[] = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
constexpr char kRouter[] = "model.layers.2.block_sparse_moe.gate.weight";

class Health : public testing::Test {
 protected:
  HealthReport Check(const fs::path& path, bool scan = true, int threads = 2) {
    ThreadPool pool(threads);
    return CheckPath(path, scan, pool, {});
  }
  // Overwrites elements of a tensor of a copied F32 model.
  void Write(const std::string& tensor, const std::map<size_t, float>& values) {
    const Checkpoint checkpoint = Checkpoint::Open(model_);
    const TensorInfo* info = checkpoint.Find(tensor);
    ASSERT_NE(info, nullptr);
    const File file = File::OpenWrite(model_ / "model.safetensors");
    for (const auto& [index, value] : values) {
      file.WriteAt(info->file_offset + index * sizeof(float), std::as_bytes(std::span(&value, 1)));
    }
  }
  const TestFolder folder_;
  const fs::path model_ = CopyFolder(GoldenFolder("mixtral"), folder_.path() / "model");
};

TEST_F(Health, GoodModelsHaveNoFindings) {
  for (const char* name :
       {"mixtral", "mixtral-bf16-fused", "qwen2_moe", "qwen3_moe-dense-layer", "deepseek-bf16"}) {
    const HealthReport report = Check(GoldenFolder(name));
    EXPECT_EQ(report.subject, "model");
    EXPECT_THAT(report.findings, IsEmpty()) << name;
    EXPECT_THAT(report.facts, Contains(HasSubstr("no tokenizer.json")));
  }
  const HealthReport sample = Check(kExamples / "sample-mixtral");
  EXPECT_THAT(sample.findings, IsEmpty());
  EXPECT_THAT(sample.facts, Contains(AllOf(HasSubstr("4 layers (4 MoE)"), HasSubstr("8 experts"),
                                           HasSubstr("2 per token"))));
  EXPECT_THAT(sample.facts, Contains(HasSubstr("4096 ids, adds BOS")));
}

TEST_F(Health, CountsNanAndInf) {
  Write(kExpert, {{0, NAN}, {77, NAN}, {64 * 24 - 1, NAN}});
  Write("lm_head.weight", {{5, INFINITY}, {6, -INFINITY}});
  const HealthReport report = Check(model_);
  EXPECT_THAT(report.findings,
              testing::UnorderedElementsAre(std::string(kExpert) + ": 3 of 1536 values are NaN",
                                            "lm_head.weight: 2 of 20480 values are Inf"));
  EXPECT_EQ(Check(model_, true, 1).findings, report.findings);
  // Without a scan the weights are not read.
  EXPECT_THAT(Check(model_, false).findings, IsEmpty());
  // The file alone.
  EXPECT_EQ(Check(model_ / "model.safetensors").findings, report.findings);
}

TEST_F(Health, FindsDeadAndEqualRouterRows) {
  std::map<size_t, float> zeros;
  for (size_t i = 0; i < 64; ++i) zeros[4 * 64 + i] = i % 2 == 0 ? 0.0f : -0.0f;
  Write(kRouter, zeros);
  EXPECT_THAT(Check(model_).findings,
              ElementsAre(std::string(kRouter) + ": router row 4 is dead (all zeros)"));
  std::map<size_t, float> equal;
  for (size_t i = 0; i < 64; ++i) {
    equal[1 * 64 + i] = static_cast<float>(i) - 30;
    equal[5 * 64 + i] = static_cast<float>(i) - 30;
  }
  Write(kRouter, equal);
  EXPECT_THAT(
      Check(model_).findings,
      testing::UnorderedElementsAre(std::string(kRouter) + ": router row 4 is dead (all zeros)",
                                    std::string(kRouter) + ": router rows 1 and 5 are equal"));
}

TEST_F(Health, FindsTensorsOfZeros) {
  std::map<size_t, float> zeros;
  for (size_t i = 0; i < 64 * 24; ++i) zeros[i] = 0;
  Write(kExpert, zeros);
  EXPECT_THAT(Check(model_).findings, ElementsAre(std::string(kExpert) + ": all values are zero"));
}

// Values beyond the first piece that is read at once, in a format of two bytes.
TEST_F(Health, ReadsLargeTensorsWhole) {
  constexpr size_t kCount = (size_t{5} << 20) / 2;
  std::vector<uint16_t> values(kCount, Bf16FromFloat(1.0f));
  values[kCount - 1] = 0x7fc0;  // NaN
  values[3] = 0xff80;           // -Inf
  const TensorData tensor{"big", Dtype::kBF16, {kCount}, std::as_bytes(std::span(values))};
  const fs::path path = folder_.path() / "big.safetensors";
  WriteSafetensors(path, std::span(&tensor, 1));
  for (const int threads : {1, 3}) {
    EXPECT_THAT(
        Check(path, true, threads).findings,
        ElementsAre("big: 1 of 2621440 values are NaN", "big: 1 of 2621440 values are Inf"));
  }
}

TEST_F(Health, TokenizersMustFitTheModel) {
  // 4,096 ids, but 320 embedding rows.
  fs::copy_file(kExamples / "sample-mixtral" / "tokenizer.json", model_ / "tokenizer.json");
  EXPECT_THROW(Check(model_), ModelError);
  EXPECT_EQ(Check(model_ / "tokenizer.json").subject, "tokenizer");
}

TEST_F(Health, KnowsPlansAndStatistics) {
  CompressionPlan plan;
  plan.method = "naee";
  plan.model_type = "mixtral";
  plan.layers = {{0, 6, {0, 1}, {}, {}, {}}};
  WriteFileAtomically(folder_.path() / "plan.json", PlanToJson(plan).dump());
  const HealthReport report = Check(folder_.path() / "plan.json");
  EXPECT_EQ(report.subject, "plan");
  EXPECT_THAT(report.facts, ElementsAre("1 layers, method naee"));
  const fs::path stats = folder_.path() / "stats";
  Observe(Model::Open(model_), {SourceOf("golden", GoldenTokens("mixtral"))},
          {.level = StatsLevel::kRouted}, stats);
  EXPECT_EQ(Check(stats).subject, "statistics");
  EXPECT_THAT(Check(stats).facts, ElementsAre("48 tokens, 3 layers, level routed"));
  fs::resize_file(LayerStatsPath(stats, 1), 500);
  EXPECT_THROW(Check(stats), ModelError);
}

TEST_F(Health, RefusesWhatItDoesNotKnow) {
  EXPECT_THROW(Check(folder_.path() / "nothing"), ModelError);
  EXPECT_THROW(Check(folder_.Write("picture.png", "x")), UsageError);
  EXPECT_THROW(Check(folder_.Write("other.json", "{}")), ModelError);
  EXPECT_THROW(Check(folder_.path()), ModelError);  // a folder without a model
}

TEST(Machine, HasFacts) {
  const HealthReport report = CheckMachine(fs::temp_directory_path());
  EXPECT_EQ(report.subject, "machine");
  EXPECT_THAT(report.facts, Contains(StartsWith("instruction sets: ")));
  EXPECT_THAT(report.facts, Contains(StartsWith("memory: ")));
}

}  // namespace
}  // namespace winnow
