// winnow quantize on the bundled sample, and every other verb on what it writes.
#include <gtest/gtest.h>

#include "base/json.h"  // ParseJson
#include "run_program.h"

namespace winnow::test {
namespace {

constexpr int kUsage = 2;

Arguments operator+(Arguments left, const Arguments& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

Json RunJson(const Arguments& arguments) {
  const ProgramResult result = RunWinnow(arguments + Arguments{"--json", "-q"});
  EXPECT_EQ(result.exit_code, 0) << arguments[0] << ": " << result.err;
  return result.exit_code == 0 ? ParseJson(result.out, "standard output") : Json::object();
}

void MustRun(const Arguments& arguments) {
  const ProgramResult result = RunWinnow(arguments + Arguments{"-q"});
  ASSERT_EQ(result.exit_code, 0) << arguments[0] << ": " << result.err;
}

void ExpectRefusal(const Arguments& arguments, const std::string& part) {
  const ProgramResult result = RunWinnow(arguments);
  EXPECT_EQ(result.exit_code, kUsage) << arguments[0] << ": " << result.err;
  EXPECT_NE(result.err.find(part), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("hint: "), std::string::npos) << result.err;
}

const Arguments kCalibration = {"--calib", CalibrationText("prose"), "--blocks", "8", "--block",
                                "64"};

TEST(Quantize, EveryVerbTakesAPackedModel) {
  const TemporaryFolder folder;
  const std::string packed = folder / "packed";
  const Json written =
      RunJson({"quantize", SampleModel(), "--experts", "8bit", "--rest", "8bit", "-o", packed});
  const Json before = RunJson({"inspect", SampleModel()});
  const Json after = RunJson({"inspect", packed});
  EXPECT_EQ(after["bytes"], written["bytes_after"]);
  EXPECT_EQ(before["bytes"], written["bytes_before"]);
  EXPECT_EQ(after["parameters"], before["parameters"]);
  EXPECT_EQ(after["active_parameters"], before["active_parameters"]);
  EXPECT_EQ(after["parts"][0]["part"], "experts");
  EXPECT_EQ(after["parts"][0]["format"], "8bit-shift");  // the best of 8 bits
  EXPECT_DOUBLE_EQ(after["parts"][0]["bits_per_weight"].get<double>(), 8.5);
  MustRun({"doctor", packed});

  // 8 bits hardly change what the model says; 2 bits do.
  const Arguments measure = {"--text", EvaluationText("prose"), "--tokens", "1024"};
  const Json compared =
      RunJson(Arguments{"eval", "ppl", packed, "--against", SampleModel()} + measure);
  EXPECT_NEAR(compared["texts"][0]["difference"]["nll"].get<double>(), 0, 0.01);
  MustRun({"quantize", SampleModel(), "--experts", "2bit", "-o", folder / "two"});
  const Json two =
      RunJson(Arguments{"eval", "ppl", folder / "two", "--against", SampleModel()} + measure);
  EXPECT_GT(two["texts"][0]["difference"]["nll"].get<double>(), 0.05);

  // The third token follows from a choice between two experts that are as good as equal.
  const Arguments generate = {"-p", "The old man", "-n", "2", "--temp", "0"};
  EXPECT_EQ(RunJson(Arguments{"run", packed} + generate)["tokens"],
            RunJson(Arguments{"run", SampleModel()} + generate)["tokens"]);
  MustRun(Arguments{"observe", packed, "-o", folder / "stats"} + kCalibration);
  MustRun({"plan", folder / "stats", "--keep", "6", "-o", folder / "plan.json"});
  MustRun({"apply", packed, "--plan", folder / "plan.json", "-o", folder / "pruned"});
  EXPECT_EQ(RunJson({"inspect", folder / "pruned"})["num_experts"], 6);
  MustRun(Arguments{"eval", "ppl", folder / "pruned"} + measure);
  MustRun(Arguments{"finetune", packed, "--data", CalibrationText("prose"), "--train",
                    "router,norms", "--block", "64", "--batch", "2", "--steps", "2", "-o",
                    folder / "tuned"});
  MustRun({"doctor", folder / "tuned"});

  // compress goes without healing where that is not possible, as ever, and says why.
  const ProgramResult compressed = RunWinnow(
      Arguments{"compress", packed, "--keep", "6", "-o", folder / "smaller"} + kCalibration);
  EXPECT_EQ(compressed.exit_code, 0) << compressed.err;
  EXPECT_NE(compressed.err.find("without healing: the model's experts are packed"),
            std::string::npos)
      << compressed.err;

  // What needs weights that are not packed says so before it works.
  ExpectRefusal(
      Arguments{"observe", packed, "--method", "cd-moe", "-o", folder / "condense"} + kCalibration,
      "packed");
  ExpectRefusal(Arguments{"apply", packed, "--plan", folder / "plan.json", "--heal", "-o",
                          folder / "healed"} +
                    kCalibration,
                "packed");
  ExpectRefusal({"finetune", packed, "--data", CalibrationText("prose"), "--train", "experts",
                 "--steps", "1", "-o", folder / "trained"},
                "packed");
  ExpectRefusal(
      {"apply", packed, "--plan", folder / "plan.json", "--export-code", "-o", folder / "exported"},
      "--export-code");
}

TEST(Quantize, FlagsCompleteEachOther) {
  const TemporaryFolder folder;
  MustRun({"quantize", SampleModel(), "--experts", "3bit", "--group", "64", "--asymmetric",
           "--rest", "bf16", "-o", folder / "a"});
  MustRun({"quantize", SampleModel(), "--experts", "3bit-asym-g64", "-t", "2", "-o", folder / "b"});
  EXPECT_TRUE(ReadFolder(folder / "a") == ReadFolder(folder / "b"));
  EXPECT_EQ(RunJson({"inspect", folder / "a"})["parts"][0]["format"], "3bit-asym-g64");
  MustRun({"quantize", SampleModel(), "--experts", "2bit", "--grid", "log", "-o", folder / "c"});
  EXPECT_EQ(RunJson({"inspect", folder / "c"})["parts"][0]["format"], "2bit-log");

  const auto quantize = [&](const Arguments& flags) {
    return Arguments{"quantize", SampleModel(), "-o", folder / "d"} + flags;
  };
  ExpectRefusal(quantize({}), "nothing to quantise");
  ExpectRefusal(quantize({"--experts", "9bit"}), "9bit");
  ExpectRefusal(quantize({"--experts", "8bit", "--grid", "log"}), "no log grid");
  ExpectRefusal(quantize({"--experts", "4bit-asym", "--group", "64"}), "4bit-asym");
  ExpectRefusal(quantize({"--experts", "4bit", "--grid", "log", "--asymmetric"}), "has no minimum");
  ExpectRefusal(quantize({"--rest", "f32"}), "stored in BF16");
  ExpectRefusal(quantize({"--experts", "4bit", "--group", "48"}), "--group");
  ExpectRefusal({"quantize", folder / "a", "--experts", "4bit", "-o", folder / "d"},
                "packed already");
  // An output that is there stays, and --force replaces it.
  ExpectRefusal({"quantize", SampleModel(), "--experts", "4bit", "-o", folder / "a"}, "exists");
  MustRun({"quantize", SampleModel(), "--experts", "4bit", "--force", "-o", folder / "a"});
  EXPECT_EQ(RunJson({"inspect", folder / "a"})["parts"][0]["format"], "4bit-curve");
  MustRun({"quantize", SampleModel(), "--experts", "4bit", "--grid", "linear", "--force", "-o",
           folder / "a"});
  EXPECT_EQ(RunJson({"inspect", folder / "a"})["parts"][0]["format"], "4bit");
  EXPECT_EQ(ListFolder(folder.path()), (std::vector<std::string>{"a", "b", "c"}));
}

}  // namespace
}  // namespace winnow::test
