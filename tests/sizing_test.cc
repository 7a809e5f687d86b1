// winnow compress --size for Winnow: experts, layers and bits under one size, on the bundled
// sample.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <map>

#include "base/json.h"  // ParseJson
#include "run_program.h"

namespace winnow::test {
namespace {

// Random weights, four MoE layers of 16 experts beside a shared one, 3.3 MiB.
std::string RoutedModel() {
  return (fs::path(WINNOW_TEST_DATA) / "cd-moe" / "tiny").string();
}

// Little text, so that a sanitizer's slowness does not matter; enough that one sequence judges.
Arguments Compress(const std::string& model, const std::string& out, const Arguments& how) {
  Arguments all = {"compress", model, "--calib", CalibrationText("prose"),
                   "--blocks", "12",  "--block", "128",
                   "-q",       "-o",  out};
  all.insert(all.end(), how.begin(), how.end());
  return all;
}

Json RunJson(Arguments arguments) {
  arguments.insert(arguments.end(), {"--json", "-q"});
  const ProgramResult result = RunWinnow(arguments);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return result.exit_code == 0 ? ParseJson(result.out, "standard output") : Json::object();
}

uint64_t WeightBytes(const fs::path& folder) {
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") bytes += entry.file_size();
  }
  return bytes;
}

double Nll(const std::string& model) {
  return RunJson({"eval", "ppl", model, "--text", EvaluationText("prose"), "--tokens", "1024"})
      .value("nll", 0.0);
}

// What RoutedModel becomes at 1M with no other flag: made once, for the tests that come to it by
// another way.
const std::map<std::string, std::string>& UndisturbedFiles() {
  static const std::map<std::string, std::string> files = [] {
    const TemporaryFolder folder;
    const ProgramResult result =
        RunWinnow(Compress(RoutedModel(), folder / "x", {"--size", "1M", "--threads", "2"}));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return ReadFolder(folder / "x");
  }();
  return files;
}

TEST(Sizing, AllMeansTogetherKeepTheSize) {
  const TemporaryFolder folder;
  const std::string out = folder / "small";
  // The model has 3.3 MiB.
  const Json result = RunJson(Compress(
      RoutedModel(), out, {"--size", "1M", "--text", EvaluationText("prose"), "--tokens", "1024"}));
  EXPECT_EQ(result["schema"], "winnow.compress/1");
  EXPECT_EQ(result["means"], "drop, condense, bits");
  EXPECT_LE(WeightBytes(out), uint64_t{1} << 20);
  EXPECT_EQ(result["bytes_after"], WeightBytes(out));
  // A size is there to be used: what one more bit for an expert takes is less than a twentieth.
  EXPECT_GT(WeightBytes(out), (uint64_t{1} << 20) * 9 / 10);
  ASSERT_EQ(result["candidates"].size(), 2U);
  // What was measured decides: the least of the two is what perplexity is said to rise by.
  const double least = std::min(result["candidates"][0]["nll_difference"].get<double>(),
                                result["candidates"][1]["nll_difference"].get<double>());
  EXPECT_NEAR(result["judged_increase"].get<double>(), std::exp(least) - 1, 1e-9);
  EXPECT_EQ(result["eval"]["texts"][0]["nll"].get<double>(), Nll(out));
  int64_t packed = 0;
  for (const auto& [format, count] : result["bits"].items()) packed += count.get<int64_t>();
  EXPECT_GT(packed, 0);
  const auto files = ReadFolder(out);
  EXPECT_TRUE(files.contains("winnow-quantize.json"));
  const std::string card =
      files.contains("WINNOW.md") ? files.at("WINNOW.md") : files.at("README.md");
  EXPECT_NE(card.find("## Chosen for a size"), std::string::npos) << card;
  EXPECT_NE(card.find("## Measured"), std::string::npos) << card;
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"small"});
}

TEST(Sizing, EachMeansAloneKeepsTheSize) {
  const TemporaryFolder folder;
  for (const std::string means : {"drop", "condense", "bits", "drop,bits"}) {
    SCOPED_TRACE(means);
    const std::string out = folder / means;
    const Json result = RunJson(Compress(RoutedModel(), out, {"--size", "2M", "--means", means}));
    EXPECT_LE(WeightBytes(out), uint64_t{2} << 20);
    EXPECT_GT(Nll(out), 0);
    const bool bits = means.ends_with("bits");
    EXPECT_EQ(fs::exists(fs::path(out) / "winnow-quantize.json"), bits);
    if (means == "bits") {
      EXPECT_EQ(result["experts_left"], 64);
    }
    if (!bits) {
      EXPECT_LT(result["experts_left"], 64);
    }
    if (means == "drop" || means == "drop,bits") {
      EXPECT_EQ(result["condensed_layers"], 0);
    }
    if (means == "condense") {
      EXPECT_GT(result["condensed_layers"], 0);
    }
  }
}

TEST(Sizing, OtherTargetsDropExpertsAlone) {
  const TemporaryFolder folder;
  const Json result = RunJson(
      Compress(SampleModel(), folder / "stock", {"--size", "6M", "--target", "transformers"}));
  EXPECT_EQ(result["plan"]["layers"][0]["kept"].size(), 6U);
  EXPECT_FALSE(fs::exists(fs::path(folder / "stock") / "winnow-quantize.json"));
  Arguments loud =
      Compress(SampleModel(), folder / "loud", {"--size", "6M", "--target", "vllm", "--no-heal"});
  loud.erase(std::find(loud.begin(), loud.end(), "-q"));
  const ProgramResult noted = RunWinnow(loud);
  EXPECT_EQ(noted.exit_code, 0) << noted.err;
  EXPECT_NE(noted.err.find("need --target winnow"), std::string::npos) << noted.err;
}

TEST(Sizing, WhatCannotBeIsRefused) {
  const TemporaryFolder folder;
  const auto exit_code = [&](const Arguments& how) {
    const ProgramResult result = RunWinnow(Compress(SampleModel(), folder / "x", how));
    EXPECT_NE(result.err.find("hint: "), std::string::npos) << result.err;
    return result.exit_code;
  };
  EXPECT_EQ(exit_code({"--size", "3M", "--means", "drop,prune"}), 2);
  EXPECT_EQ(exit_code({"--size", "3M", "--means", "drop", "--target", "vllm"}), 2);
  EXPECT_EQ(exit_code({"--keep", "6", "--means", "drop"}), 2);
  EXPECT_EQ(exit_code({"--size", "3M", "--bits-of-rest", "9bit"}), 2);
  EXPECT_EQ(exit_code({"--size", "3M", "--means", "drop", "--bits-of-rest", "4bit"}), 2);
  EXPECT_EQ(exit_code({"--size", "100M"}), 2);
  EXPECT_EQ(exit_code({"--size", "3M", "--blocks", "2"}), 2);
  EXPECT_TRUE(ListFolder(folder.path()).empty());
  // Gates: what was gathered stays, the output does not appear.
  EXPECT_EQ(exit_code({"--size", "200K", "--means", "bits"}), 5);
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"x.work"});
  EXPECT_EQ(exit_code({"--size", "2300K", "--means", "bits", "--max-ppl-increase", "0.0001%",
                       "--resume"}),
            5);
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"x.work"});
  EXPECT_EQ(RunWinnow(Compress(SampleModel(), folder / "x",
                               {"--size", "2300K", "--means", "bits", "--max-ppl-increase", "400%",
                                "--resume"}))
                .exit_code,
            0);
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"x"});
}

TEST(Sizing, DryRunsWriteNothing) {
  const TemporaryFolder folder;
  const Json result = RunJson(Compress(RoutedModel(), folder / "x", {"--size", "1M", "--dry-run"}));
  EXPECT_EQ(result["schema"], "winnow.dry-run/1");
  EXPECT_FALSE(result["memory"].empty());
  EXPECT_TRUE(ListFolder(folder.path()).empty());
}

TEST(Sizing, ThreadsDoNotChangeABit) {
  const TemporaryFolder folder;
  const ProgramResult result =
      RunWinnow(Compress(RoutedModel(), folder / "x", {"--size", "1M", "--threads", "1"}));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_TRUE(ReadFolder(folder / "x") == UndisturbedFiles());
}

TEST(Sizing, AnInterruptedRunLeavesItsWorkAndGoesOn) {
  const TemporaryFolder folder;
  const std::string out = folder / "stopped";
  const ProgramResult stopped =
      RunWinnowUntil(Compress(RoutedModel(), out, {"--size", "1M"}), SIGINT,
                     [&] { return fs::exists(out + ".work/neurons"); });
  if (stopped.exit_code != 0) {  // else it was faster than the signal
    EXPECT_EQ(stopped.exit_code, 130) << stopped.err;
    EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"stopped.work"});
    EXPECT_EQ(RunWinnow(Compress(RoutedModel(), out, {"--size", "1M"})).exit_code, 2);
    const ProgramResult resumed =
        RunWinnow(Compress(RoutedModel(), out, {"--size", "1M", "--resume"}));
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  }
  EXPECT_TRUE(ReadFolder(out) == UndisturbedFiles());
}

}  // namespace
}  // namespace winnow::test
