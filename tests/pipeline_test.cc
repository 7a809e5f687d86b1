// The way from a model to a smaller one on the bundled sample: what each verb writes, and that the
// ways lead to the same result. Expected values were computed with transformers 5.24 and torch 2.15
// (float32, eager attention) from the same files.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <set>

#include "base/json.h"  // ParseJson
#include "checkpoint/safetensors_writer.h"
#include "run_program.h"

namespace winnow::test {
namespace {

// Little text, so that a sanitizer's slowness does not matter.
const Arguments kCalibration = {"--calib",
                                CalibrationText("prose"),
                                CalibrationText("code") + ":2",
                                "--blocks",
                                "12",
                                "--block",
                                "128",
                                "--seed",
                                "7"};

Arguments operator+(Arguments left, const Arguments& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

Json RunJson(const Arguments& arguments) {
  const ProgramResult result = RunWinnow(arguments + Arguments{"--json", "-q"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return result.exit_code == 0 ? ParseJson(result.out, "standard output") : Json::object();
}

void MustRun(const Arguments& arguments) {
  const ProgramResult result = RunWinnow(arguments + Arguments{"-q"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
}

void Prune(const TemporaryFolder& folder, const std::string& stats, const std::string& keep,
           const std::string& out) {
  MustRun({"plan", stats, "--method", "naee", "--keep", keep, "-o", out + ".json"});
  MustRun({"apply", SampleModel(), "--plan", out + ".json", "-o", out});
  ASSERT_TRUE(fs::exists(fs::path(out) / "config.json")) << folder.path();
}

TEST(Pipeline, PerplexityAgreesWithTransformers) {
  // Mean negative log-likelihood of the first 2,048 tokens, protocol bos-512.
  const std::map<std::string, double> expected = {{"prose", 3.826115760227985},
                                                  {"docs", 2.993952855110284},
                                                  {"code", 2.460511044749502},
                                                  {"math", 2.848428980333308},
                                                  {"other", 3.813863572997634}};
  for (const auto& [domain, nll] : expected) {
    const Json result = RunJson({"eval", "ppl", SampleModel(), "--text", EvaluationText(domain),
                                 "--tokens", "2048", "--compute", "f32"});
    // Both in float32; sums are taken in another order.
    EXPECT_NEAR(result.value("nll", 0.0), nll, 1e-5) << domain;
    EXPECT_EQ(result.value("tokens", 0), 2048) << domain;
  }
}

TEST(Pipeline, GreedyTextAgreesWithTransformers) {
  const Json result = RunJson(
      {"run", SampleModel(), "-p", "The old man", "-n", "24", "--temp", "0", "--compute", "f32"});
  // Each step's best logit leads by at least 0.065.
  const std::vector<int> expected = {267, 343, 1719, 272, 527, 490, 1406, 773, 267, 343, 1719, 272,
                                     527, 490, 1406, 773, 267, 343, 1719, 272, 527, 490, 1406, 773};
  EXPECT_EQ(result["tokens"], Json::array({expected}));
  EXPECT_EQ(result["text"],
            "'s own, and the old man's own, and the old man's own, and the old man");
}

TEST(Pipeline, WritesASmallerModelThatRuns) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  Prune(folder, folder / "stats", "5", folder / "small");
  const Json before = RunJson({"inspect", SampleModel()});
  const Json after = RunJson({"inspect", folder / "small"});
  EXPECT_EQ(before["num_experts"], 8);
  EXPECT_EQ(after["num_experts"], 5);
  // Three experts of 3 x 128 x 256 and a router row of 128 each, two bytes a number, four layers.
  const int64_t removed = int64_t{4} * 3 * (3 * 128 * 256 + 128) * 2;
  EXPECT_EQ(before["bytes"].get<int64_t>() - after["bytes"].get<int64_t>(), removed);
  const Json config = ParseJson(ReadFolder(folder / "small")["config.json"], "config.json");
  EXPECT_EQ(config["num_local_experts"], 5);
  EXPECT_EQ(config["num_experts_per_tok"], 2);
  EXPECT_EQ(ReadFolder(folder / "small")["tokenizer.json"],
            ReadFolder(SampleModel())["tokenizer.json"]);
  const Json text = RunJson({"run", folder / "small", "-p", "The old man", "-n", "8"});
  EXPECT_EQ(text["tokens"][0].size(), 8u);
}

TEST(Pipeline, APlanOnTheOriginalBehavesLikeTheWrittenModel) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  Prune(folder, folder / "stats", "6", folder / "small");
  const Arguments measure = {"--text", EvaluationText("prose"), "--tokens", "1024"};
  const Json written = RunJson(Arguments{"eval", "ppl", folder / "small"} + measure);
  const Json what_if =
      RunJson(Arguments{"eval", "ppl", SampleModel(), "--plan", folder / "small.json"} + measure);
  EXPECT_EQ(written["nll"], what_if["nll"]);
  const Json compared =
      RunJson(Arguments{"eval", "ppl", folder / "small", "--against", SampleModel()} + measure);
  const Json& row = compared["texts"][0];
  EXPECT_EQ(row["nll"], written["nll"]);
  EXPECT_NEAR(row["difference"]["nll"].get<double>(),
              row["nll"].get<double>() - row["original"]["nll"].get<double>(), 1e-9);
}

TEST(Pipeline, PlansMadeAsIfAnotherWereAppliedNameTheExpertsOfTheOriginal) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  Prune(folder, folder / "stats", "6", folder / "six");
  // In two steps on disk: the pruned model is observed and pruned again.
  MustRun(Arguments{"observe", folder / "six", "-o", folder / "six-stats"} + kCalibration);
  MustRun({"plan", folder / "six-stats", "--keep", "4", "-o", folder / "four.json"});
  MustRun({"apply", folder / "six", "--plan", folder / "four.json", "-o", folder / "four"});
  // The same without writing the model in between.
  MustRun(
      Arguments{"observe", SampleModel(), "--plan", folder / "six.json", "-o", folder / "as-if"} +
      kCalibration);
  const Json plan = RunJson({"plan", folder / "as-if", "--keep", "4", "-o", folder / "both.json"});
  EXPECT_EQ(plan["layers"][0]["num_experts"], 8);
  EXPECT_EQ(plan["layers"][0]["dropped"].size(), 4U);
  MustRun({"apply", SampleModel(), "--plan", folder / "both.json", "-o", folder / "both"});
  EXPECT_TRUE(ReadFolder(folder / "both")["model.safetensors"] ==
              ReadFolder(folder / "four")["model.safetensors"]);
  EXPECT_EQ(RunWinnow({"stats", "merge", folder / "stats", folder / "as-if", "-o", folder / "sum"})
                .exit_code,
            2);
}

TEST(Pipeline, CompressWritesWhatTheStepsWrite) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "--stats", "full", "-o", folder / "stats"} +
          kCalibration);
  Prune(folder, folder / "stats", "6", folder / "steps");
  MustRun(Arguments{"compress", SampleModel(), "--keep", "6", "--no-heal", "--per-document", "0",
                    "-o", folder / "at-once"} +
          kCalibration);
  const auto steps = ReadFolder(folder / "steps");
  const auto at_once = ReadFolder(folder / "at-once");
  ASSERT_FALSE(steps.empty());
  for (const auto& [name, content] : steps) {
    ASSERT_TRUE(at_once.contains(name)) << name;
    EXPECT_TRUE(at_once.at(name) == content) << name;
  }
  EXPECT_EQ(ListFolder(folder.path()),
            (std::vector<std::string>{"at-once", "stats", "steps", "steps.json"}));
}

TEST(Pipeline, UnevenBudgetsAreForWinnowAlone) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  const Arguments uneven = {"plan", folder / "stats", "--keep", "5", "--budget", "uneven"};
  const ProgramResult refused = RunWinnow(uneven + Arguments{"-o", folder / "refused.json"});
  EXPECT_EQ(refused.exit_code, 2) << refused.err;
  EXPECT_NE(refused.err.find("--target winnow"), std::string::npos) << refused.err;
  const Json plan = RunJson(uneven + Arguments{"--target", "winnow", "-o", folder / "uneven.json"});
  size_t survivors = 0;
  std::set<size_t> counts;
  for (const Json& layer : plan["layers"]) {
    survivors += layer["kept"].size();
    counts.insert(layer["kept"].size());
    EXPECT_GE(layer["kept"].size(), 2U);
  }
  EXPECT_EQ(survivors, 20U);
  EXPECT_GT(counts.size(), 1U);
  MustRun({"apply", SampleModel(), "--plan", folder / "uneven.json", "-o", folder / "uneven"});
  const Json config = ParseJson(ReadFolder(folder / "uneven")["config.json"], "config.json");
  EXPECT_EQ(config["num_experts_per_layer"].size(), 4U);
  const Arguments measure = {"--text", EvaluationText("prose"), "--tokens", "1024"};
  const Json written = RunJson(Arguments{"eval", "ppl", folder / "uneven"} + measure);
  const Json what_if =
      RunJson(Arguments{"eval", "ppl", SampleModel(), "--plan", folder / "uneven.json"} + measure);
  EXPECT_EQ(written["nll"], what_if["nll"]);
}

TEST(Pipeline, SkippingIsWrittenHonouredAndSwitchedOff) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  const std::string plan = folder / "skip.json", out = folder / "skips";
  MustRun({"plan", folder / "stats", "--method", "naee-skip", "--active", "1.5", "-o", plan});
  MustRun({"apply", SampleModel(), "--plan", plan, "-o", out});
  const Json config = ParseJson(ReadFolder(out)["config.json"], "config.json");
  EXPECT_EQ(config["betas"].size(), 4U);
  EXPECT_GT(config["betas"]["1"].get<double>(), 0);
  const Arguments measure = {"--text", EvaluationText("prose"), "--tokens", "1024"};
  const Json written = RunJson(Arguments{"eval", "ppl", out} + measure);
  EXPECT_NEAR(written["experts_per_token"].get<double>(), 1.5, 0.1);
  EXPECT_NEAR(written["skipped_share"].get<double>(),
              2 - written["experts_per_token"].get<double>(), 1e-12);
  EXPECT_EQ(written["skipped_share_per_layer"].size(), 4U);
  const Json what_if = RunJson(Arguments{"eval", "ppl", SampleModel(), "--plan", plan} + measure);
  EXPECT_EQ(written["nll"], what_if["nll"]);
  const Json off = RunJson(Arguments{"eval", "ppl", out, "--no-skip"} + measure);
  const Json original = RunJson(Arguments{"eval", "ppl", SampleModel()} + measure);
  EXPECT_EQ(off["nll"], original["nll"]);
  EXPECT_EQ(written["without_skipping"][0]["nll"], original["texts"][0]["nll"]);
  EXPECT_FALSE(off.contains("experts_per_token"));
  const Json run = RunJson({"run", out, "-p", "The old man", "-n", "8"});
  EXPECT_LT(run["experts_per_token"].get<double>(), 2);
  // Pruned further, the thresholds are gone: they were measured among all experts.
  MustRun({"plan", folder / "stats", "--keep", "6", "-o", folder / "six.json"});
  Json six = ParseJson(ReadFolder(folder.path())["six.json"], "six.json");
  six["model"].erase("fingerprint");
  std::ofstream(folder / "six.json") << six.dump();
  MustRun({"apply", out, "--plan", folder / "six.json", "-o", folder / "six"});
  EXPECT_FALSE(
      ParseJson(ReadFolder(folder / "six")["config.json"], "config.json").contains("betas"));
}

TEST(Pipeline, HealingRepairsWithoutAChangeOfFormat) {
  const TemporaryFolder folder;
  Arguments text;
  for (const char* domain : {"prose", "docs", "code", "math", "other"}) {
    text.insert(text.end(), {"--calib", CalibrationText(domain)});
  }
  const Arguments calibration = text + Arguments{"--blocks", "40", "--block", "128"};
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + calibration);
  Prune(folder, folder / "stats", "5", folder / "pruned");
  const Json healed = RunJson(Arguments{"apply", SampleModel(), "--plan", folder / "pruned.json",
                                        "--heal", "-o", folder / "healed"} +
                              calibration);
  EXPECT_EQ(healed["healing"]["kept"], true);
  EXPECT_LT(healed["healing"]["nll_healed"], healed["healing"]["nll_pruned"]);
  auto before = ReadFolder(folder / "pruned"), after = ReadFolder(folder / "healed");
  EXPECT_EQ(before["model.safetensors"].size(), after["model.safetensors"].size());
  EXPECT_NE(before["model.safetensors"], after["model.safetensors"]);
  EXPECT_NE(after["WINNOW.md"].find("down projections refitted"), std::string::npos);
  EXPECT_NE(after["WINNOW.md"].find("calibration tokens no fit has seen: intact "),
            std::string::npos);
  before.erase("model.safetensors");
  after.erase("model.safetensors");
  before.erase("WINNOW.md");
  after.erase("WINNOW.md");
  EXPECT_EQ(before, after);
  // On text of its own, about half of the damage is gone already with this little text to heal on.
  const Json judged = RunJson({"eval", "ppl", folder / "healed", "--against", folder / "pruned",
                               "--text", EvaluationText("math"), "--tokens", "4096"});
  EXPECT_LT(judged["texts"][0]["difference"]["nll"].get<double>(), -0.3);
}

TEST(Pipeline, CompressFindsHowMuchMayGo) {
  const TemporaryFolder folder;
  const auto compress = [&](const Arguments& how, const std::string& out) {
    return RunWinnow(
        Arguments{"compress", SampleModel(), "--no-heal", "--json", "-q", "-o", folder / out} +
        kCalibration + how);
  };
  const auto kept = [](const ProgramResult& result) {
    return ParseJson(result.out, "compress")["plan"]["layers"][0]["kept"].size();
  };
  // The model has 7.4 MiB, an expert of its four layers 0.75 MiB together.
  const ProgramResult sized = compress({"--size", "6M", "--target", "transformers"}, "sized");
  ASSERT_EQ(sized.exit_code, 0) << sized.err;
  EXPECT_EQ(kept(sized), 6U);
  EXPECT_LE(ParseJson(sized.out, "compress")["bytes_after"].get<int64_t>(), 6 << 20);
  const ProgramResult impossible =
      compress({"--size", "1M", "--target", "transformers"}, "impossible");
  EXPECT_EQ(impossible.exit_code, 5) << impossible.err;
  EXPECT_NE(impossible.err.find("2.9 MiB with 2 experts"), std::string::npos) << impossible.err;

  const ProgramResult found = compress({"--max-ppl-increase", "30%"}, "found");
  ASSERT_EQ(found.exit_code, 0) << found.err;
  EXPECT_LE(ParseJson(found.out, "compress")["judged_increase"].get<double>(), 0.3);
  const std::string fewer = std::to_string(kept(found) - 1);
  EXPECT_EQ(compress({"--max-ppl-increase", "30%", "--keep", fewer}, "fewer").exit_code, 5);
  EXPECT_EQ(compress({"--max-ppl-increase", "0%"}, "none").exit_code, 5);
  EXPECT_EQ(compress({"--max-ppl-increase", "5"}, "no-percentage").exit_code, 2);
  EXPECT_EQ(compress({"--size", "6M", "--keep", "6"}, "both").exit_code, 2);
  EXPECT_EQ(compress({}, "nothing").exit_code, 2);

  const ProgramResult skips = compress({"--active", "1.5"}, "skips");
  ASSERT_EQ(skips.exit_code, 0) << skips.err;
  EXPECT_EQ(kept(skips), 8U);
  const ProgramResult both = compress({"--active", "1.5", "--keep", "6"}, "pruned-skips");
  ASSERT_EQ(both.exit_code, 0) << both.err;
  const Json config = ParseJson(ReadFolder(folder / "pruned-skips")["config.json"], "config.json");
  EXPECT_EQ(config["num_local_experts"], 6);
  EXPECT_EQ(config["betas"].size(), 4U);
  // Healed and skipping models are measured before they are published.
  const ProgramResult late =
      RunWinnow(Arguments{"compress", SampleModel(), "-q", "--keep", "4", "--active", "1.1",
                          "--max-ppl-increase", "0.1%", "-o", folder / "late"} +
                kCalibration);
  EXPECT_EQ(late.exit_code, 5) << late.err;
  // What was refused wrote no checkpoint, but its statistics answer again.
  EXPECT_EQ(ListFolder(folder.path()),
            (std::vector<std::string>{"fewer.work", "found", "late.work", "none.work",
                                      "pruned-skips", "sized", "skips"}));
  const ProgramResult again = compress({"--max-ppl-increase", "60%", "--resume"}, "none");
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_FALSE(fs::exists(folder / "none.work"));
  EXPECT_EQ(compress({"--size", "100M"}, "fits").exit_code, 2);
  EXPECT_EQ(compress({"--keep", "6", "--active", "3"}, "too-many").exit_code, 2);
  EXPECT_FALSE(fs::exists(folder / "too-many.work"));
  // With another number of survivors too.
  const ProgramResult more =
      RunWinnow(Arguments{"compress", SampleModel(), "-q", "--keep", "7", "--max-ppl-increase",
                          "60%", "--resume", "-o", folder / "late"} +
                kCalibration);
  EXPECT_EQ(more.exit_code, 0) << more.err;
  // Nothing of another program's is taken for ours.
  fs::create_directory(folder / "strange.work");
  std::ofstream(folder / "strange.work/notes.txt") << "mine";
  EXPECT_EQ(compress({"--size", "6M", "--resume"}, "strange").exit_code, 2);
  EXPECT_TRUE(fs::exists(folder / "strange.work/notes.txt"));
}

TEST(Pipeline, TheCurveSaysWhatPlansSay) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  const Json curve = RunJson({"plan", folder / "stats", "--curve"});
  ASSERT_EQ(curve["rows"].size(), 6U);  // 7 to 2 survivors
  for (const Json& row : curve["rows"]) {
    const Json plan =
        RunJson({"plan", folder / "stats", "--search", "eliminate", "--keep", row["keep"].dump()});
    double loss = 0;
    for (const Json& layer : plan["layers"]) loss += layer["loss"].get<double>();
    // The curve goes on from the set before with its exchanges, a plan eliminates straight on: both
    // end in sets that no exchange betters.
    EXPECT_NEAR(row["loss"].get<double>(), loss, 0.01 * loss);
    EXPECT_EQ(row["bytes_after"], plan["predicted"]["bytes_after"]);
  }
}

TEST(Pipeline, AMixIsAnotherTextWithoutAnotherPass) {
  const TemporaryFolder folder;
  const Arguments cut = {"--blocks", "8", "--block", "128"};
  const Arguments prose = {"--calib", CalibrationText("prose")},
                  code = {"--calib", CalibrationText("code")};
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "both", "--blocks", "16", "--block",
                    "128"} +
          prose + code);
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "code"} + cut + code);
  const Json mixed =
      RunJson({"plan", folder / "both", "--keep", "5", "--mix", "prose.calib=0,code.calib=1"});
  const Json alone = RunJson({"plan", folder / "code", "--keep", "5"});
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(mixed["layers"][i]["kept"], alone["layers"][i]["kept"]);
    EXPECT_EQ(mixed["layers"][i]["loss"], alone["layers"][i]["loss"]);
  }
  EXPECT_EQ(mixed["calibration"]["mix"]["prose.calib"], 0);
  EXPECT_EQ(mixed["predicted"]["output_loss"], alone["predicted"]["output_loss"]);
  EXPECT_GT(mixed["predicted"]["output_loss_by_source"]["prose.calib"].get<double>(),
            mixed["predicted"]["output_loss"].get<double>());
  for (const char* wrong :
       {"prose=1", "prose.calib", "prose.calib=-1", "prose.calib=x", "prose.calib=0,code.calib=0",
        "code.calib=1,code.calib=2", "code.calib=1e40", "code.calib=1e-50"}) {
    EXPECT_EQ(RunWinnow({"plan", folder / "both", "--keep", "5", "--mix", wrong}).exit_code, 2)
        << wrong;
  }
}

TEST(Pipeline, ObservingUntilStableStopsWhereTheChoiceDoes) {
  const TemporaryFolder folder;
  const Arguments calibration = {"--calib", CalibrationText("prose"), "--blocks", "32", "--block",
                                 "128"};
  const Json rounds = RunJson(Arguments{"observe", SampleModel(), "--until-stable", "--keep", "6",
                                        "-o", folder / "rounds"} +
                              calibration);
  const auto count = rounds["rounds"].size();
  ASSERT_GE(count, 2U);
  EXPECT_EQ(rounds["stable"], rounds["rounds"].back()["changed_layers"].empty());
  EXPECT_EQ(rounds["tokens"], rounds["rounds"].back()["tokens"]);
  // Its statistics are those of one pass over as much of the text: blocks are sums over tokens.
  const auto blocks = std::to_string(rounds["tokens"].get<int64_t>() / 128);
  MustRun({"observe", SampleModel(), "--calib", CalibrationText("prose"), "--blocks", blocks,
           "--block", "128", "-o", folder / "all"});
  for (const char* method : {"reap", "ean", "frequency"}) {
    const Json joined = RunJson({"plan", folder / "rounds", "--keep", "6", "--method", method});
    const Json at_once = RunJson({"plan", folder / "all", "--keep", "6", "--method", method});
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(joined["layers"][i]["kept"], at_once["layers"][i]["kept"]) << method;
    }
  }
  EXPECT_EQ(ListFolder(folder.path()), (std::vector<std::string>{"all", "rounds"}));
}

TEST(Pipeline, WeightsAloneMakeAPlan) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "--stats", "routing", "-o", folder / "stats"} +
          kCalibration);
  const Json without = RunJson({"plan", SampleModel(), "--method", "aimer", "--keep", "6"});
  const Json with = RunJson({"plan", folder / "stats", "--method", "aimer", "--keep", "6"});
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(without["layers"][i]["kept"], with["layers"][i]["kept"]);
  }
  EXPECT_EQ(without["predicted"]["bytes_after"], with["predicted"]["bytes_after"]);
  const ProgramResult refused = RunWinnow({"plan", SampleModel(), "--keep", "6"});
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_NE(refused.err.find("is a checkpoint, not statistics"), std::string::npos) << refused.err;
}

// A tiny model of random weights with a shared expert, so that a sanitizer's slowness does not
// matter.
std::string RoutedModel() {
  return (fs::path(WINNOW_TEST_DATA) / "cd-moe" / "tiny").string();
}

double Nll(const std::string& model) {
  return RunJson({"eval", "ppl", model, "--text", EvaluationText("prose"), "--tokens", "1024",
                  "--compute", "f32"})
      .value("nll", 0.0);
}

// CD-MoE through the program: any width from one observation, layers searched or named, and the
// same model in parts, fused and, for the first layer, as a stock dense layer.
TEST(Pipeline, CondensesLayersAsPublished) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", RoutedModel(), "--method", "cd-moe", "--max-experts", "2",
                    "--compute", "f32", "-o", folder / "stats"} +
          kCalibration);
  const Arguments plan = {"plan", folder / "stats", "--method", "cd-moe", "--model", RoutedModel()};
  const Json searched = RunJson(plan + Arguments{"--experts", "2", "--layers", "2"});
  EXPECT_EQ(searched["layer_order"].size(), 2U);
  EXPECT_EQ(searched["layer_js_candidates"][0].size(), 4U);
  const Json by_kl =
      RunJson(plan + Arguments{"--experts", "0", "--layers", "2", "--layer-order", "kl"});
  EXPECT_EQ(by_kl["layer_kl"].size(), 4U);
  MustRun(plan + Arguments{"--experts", "1", "--moe-layers", "0", "-o", folder / "first.json"});
  const Arguments apply = {"apply", RoutedModel(), "--plan", folder / "first.json"};
  MustRun(apply + Arguments{"-o", folder / "parts"});
  MustRun(apply + Arguments{"--fuse", "--dtype", "f32", "--export-code", "-o", folder / "fused"});
  MustRun(apply + Arguments{"--stock", "--dtype", "f32", "-o", folder / "stock"});
  EXPECT_TRUE(fs::exists(fs::path(folder / "fused") / "modeling_winnow.py"));
  const double parts = Nll(folder / "parts");
  EXPECT_NE(parts, Nll(RoutedModel()));
  EXPECT_NEAR(Nll(folder / "fused"), parts, 1e-5);  // the same sums in another order
  EXPECT_NEAR(Nll(folder / "stock"), parts, 1e-5);
  EXPECT_EQ(RunWinnow(plan + Arguments{"--experts", "3", "--layers", "2"}).exit_code, 2);
  EXPECT_EQ(RunWinnow(plan + Arguments{"--experts", "1", "--moe-layers", "9"}).exit_code, 2);
  EXPECT_EQ(RunWinnow({"eval", "ppl", RoutedModel(), "--plan", folder / "first.json", "--text",
                       EvaluationText("prose")})
                .exit_code,
            2);
}

// By neurons with a refit, and a mix with pruned layers; then some steps of tuning from the
// original.
TEST(Pipeline, CondensesByNeuronsMixesAndTunes) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", RoutedModel(), "--method", "condense", "--width", "3", "-o",
                    folder / "neurons"} +
          kCalibration);
  MustRun(Arguments{"observe", RoutedModel(), "--stats", "full", "-o", folder / "full"} +
          kCalibration);
  MustRun({"plan", folder / "neurons", "--method", "condense", "--width", "2", "--layers", "1",
           "--model", RoutedModel(), "-o", folder / "one.json"});
  MustRun({"apply", RoutedModel(), "--plan", folder / "one.json", "-o", folder / "folded"});
  MustRun(Arguments{"apply", RoutedModel(), "--plan", folder / "one.json", "--heal", "-o",
                    folder / "healed"} +
          kCalibration);
  // Whether healing is kept depends on the text, which random weights know nothing of.
  EXPECT_TRUE(fs::exists(fs::path(folder / "healed") / "config.json"));
  MustRun({"plan", folder / "full", "--method", "mix", "--with", folder / "neurons", "--total",
           "40", "--model", RoutedModel(), "-o", folder / "mix.json"});
  const ProgramResult many =
      RunWinnow({"plan", folder / "full", "--method", "mix", "--with", folder / "neurons",
                 "--total", "1000000000000", "--model", RoutedModel()});
  EXPECT_EQ(many.exit_code, 2);
  EXPECT_NE(many.err.find("the model has 64 experts"), std::string::npos) << many.err;
  MustRun({"apply", RoutedModel(), "--plan", folder / "mix.json", "-o", folder / "mix"});
  EXPECT_NE(Nll(folder / "mix"), Nll(RoutedModel()));
  const Json tuned = RunJson({"finetune", folder / "folded", "--teacher", RoutedModel(), "--data",
                              CalibrationText("prose"), "--block", "64", "--batch", "4", "--steps",
                              "4", "--lr", "1e-3", "--held-out", "0", "-o", folder / "tuned"});
  EXPECT_EQ(tuned["steps"], 4);
  EXPECT_LT(tuned["loss"]["last"].get<double>(), tuned["loss"]["first"].get<double>());
  EXPECT_NE(Nll(folder / "tuned"), Nll(folder / "folded"));
}

TEST(Pipeline, TraceBehavesAsIfThePlanWereApplied) {
  const TemporaryFolder folder;
  MustRun(Arguments{"observe", SampleModel(), "-o", folder / "stats"} + kCalibration);
  Prune(folder, folder / "stats", "5", folder / "small");
  std::vector<int32_t> ids(24);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(3 + 7 * i);
  const std::vector<TensorData> tensors = {
      {"input_ids", Dtype::kI32, {2, 12}, std::as_bytes(std::span(std::as_const(ids)))}};
  WriteSafetensors(folder / "ids.safetensors", tensors);
  const Arguments rows = {"--ids", folder / "ids.safetensors", "--compute", "f32"};
  MustRun(Arguments{"trace", folder / "small", "-o", folder / "written.safetensors"} + rows);
  MustRun(Arguments{"trace", SampleModel(), "--plan", folder / "small.json", "-o",
                    folder / "as-if.safetensors"} +
          rows);
  auto files = ReadFolder(folder.path());
  EXPECT_TRUE(files["written.safetensors"] == files["as-if.safetensors"]);
}

TEST(Pipeline, ThreadsDoNotChangeABit) {
  const TemporaryFolder folder;
  for (const std::string threads : {"1", "2", "5"}) {
    MustRun(Arguments{"observe", SampleModel(), "--stats", "full", "--threads", threads, "-o",
                      folder / threads} +
            kCalibration);
    Prune(folder, folder / threads, "4", folder / (threads + "-small"));
  }
  const auto stats = ReadFolder(folder / "1");
  const auto small = ReadFolder(folder / "1-small");
  ASSERT_FALSE(stats.empty());
  for (const std::string threads : {"2", "5"}) {
    EXPECT_TRUE(ReadFolder(folder / threads) == stats) << threads << " threads";
    EXPECT_TRUE(ReadFolder(folder / (threads + "-small")) == small) << threads << " threads";
  }
}

}  // namespace
}  // namespace winnow::test
