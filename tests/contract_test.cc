// What scripts rely on: exit codes, error and hint lines, clean streams, and that a run which fails
// leaves nothing behind and touches nothing that was there.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "base/json.h"  // ParseJson
#include "run_program.h"

namespace winnow::test {
namespace {

constexpr int kUsage = 2;
constexpr int kModel = 3;
constexpr int kResource = 4;

const char* const kVerbs[] = {"inspect", "doctor",   "observe",  "plan",  "apply",
                              "eval",    "run",      "compress", "stats", "tokenize",
                              "trace",   "finetune", "quantize", "bench", "serve"};

void WriteText(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

void ExpectRefusal(const ProgramResult& result, int exit_code) {
  EXPECT_EQ(result.exit_code, exit_code) << result.err;
  EXPECT_NE(result.err.find("error: "), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("hint: "), std::string::npos) << result.err;
  EXPECT_EQ(result.out, "");
}

// A copy of the sample that a test may damage.
std::string CopyModel(const TemporaryFolder& folder) {
  const std::string copy = folder / "model";
  fs::copy(SampleModel(), copy);
  for (const auto& entry : fs::directory_iterator(copy)) {
    fs::permissions(entry.path(), fs::perms::owner_write, fs::perm_options::add);
  }
  return copy;
}

std::string SampleItems() {
  return WINNOW_SOURCE_DIR "/examples/text/continuation.eval.jsonl.xz";
}

TEST(Contract, EveryVerbExplainsItself) {
  const ProgramResult all = RunWinnow({"--help"});
  EXPECT_EQ(all.exit_code, 0);
  for (const std::string verb : kVerbs) {
    EXPECT_NE(all.out.find("\n  " + verb + " "), std::string::npos) << verb;
    const ProgramResult help = RunWinnow({verb, "-h"});
    EXPECT_EQ(help.exit_code, 0) << verb;
    EXPECT_NE(help.out.find("Usage:"), std::string::npos) << verb;
    EXPECT_EQ(help.err, "") << verb;
  }
}

TEST(Contract, MisspellingsAreUsageErrorsWithASuggestion) {
  const ProgramResult verb = RunWinnow({"inspekt", SampleModel()});
  ExpectRefusal(verb, kUsage);
  EXPECT_NE(verb.err.find("did you mean inspect?"), std::string::npos) << verb.err;
  const ProgramResult flag = RunWinnow({"plan", "stats", "--keap", "3"});
  ExpectRefusal(flag, kUsage);
  EXPECT_NE(flag.err.find("did you mean --keep?"), std::string::npos) << flag.err;
  EXPECT_EQ(RunWinnow({"run", SampleModel()}).exit_code, kUsage);
  ExpectRefusal(RunWinnow({"run", SampleModel(), "-p", "x", "--max-memory", "lots"}), kUsage);
}

// Flags that contradict each other or would do nothing: refused before any work, with what to do.
TEST(Contract, ContradictingFlagsAreRefused) {
  const TemporaryFolder folder;
  const std::string stats = folder / "stats";
  ASSERT_EQ(RunWinnow({"observe", SampleModel(), "--calib", CalibrationText("math"), "--blocks",
                       "4", "--block", "64", "-o", stats, "-q"})
                .exit_code,
            0);
  const std::vector<Arguments> commands = {
      {"plan", stats, "--curve", "--keep", "6"},
      {"plan", stats, "--curve", "--method", "reap"},
      {"plan", stats, "--curve", "-o", folder / "curve.json"},
      {"plan", stats, "--keep", "6", "--all-tokens"},
      {"plan", stats, "--keep", "6", "--quantile", "0.5"},
      {"plan", stats, "--method", "naee-skip", "--quantile", "0.5", "--active", "1.5"},
      {"plan", SampleModel(), "--method", "reap", "--keep", "6"},
      {"plan", SampleModel(), "--method", "aimer", "--compare", "--keep", "6"},
      {"observe", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--until-stable"},
      {"observe", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--until-stable", "--keep", "6", "--stats", "routed"},
      {"observe", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--until-stable", "--progressive", "--keep", "6"},
      {"observe", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--repair-drift"},
      {"plan", SampleModel(), "--method", "aimer", "--search", "eliminate", "--keep", "6"},
      {"plan", stats, "--method", "naee-skip", "--objective", "squared"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--progressive", "--size", "5M"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--progressive", "--keep", "6", "--budget", "uneven", "--target", "winnow"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--blocks", "2", "--max-ppl-increase", "5%"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x", "--size",
       "small"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "-o", folder / "x",
       "--budget", "uneven", "--keep", "5"}};
  for (const Arguments& command : commands) {
    std::string line;
    for (const std::string& word : command) line += word + " ";
    SCOPED_TRACE(line);
    ExpectRefusal(RunWinnow(command), kUsage);
  }
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"stats"});
}

TEST(Contract, JsonIsOneObjectAloneOnStandardOutput) {
  const TemporaryFolder folder;
  const std::string stats = folder / "stats";
  const std::string plan = folder / "plan.json";
  const std::vector<Arguments> commands = {
      {"inspect", SampleModel()},
      {"observe", SampleModel(), "--calib", CalibrationText("math"), "--blocks", "4", "--block",
       "64", "-o", stats},
      {"plan", stats, "--keep", "6", "-o", plan},
      {"apply", SampleModel(), "--plan", plan, "-o", folder / "small"},
      {"quantize", folder / "small", "--experts", "4bit", "-o", folder / "packed"},
      {"eval", "ppl", folder / "small", "--text", EvaluationText("math"), "--tokens", "512"},
      {"eval", "tasks", folder / "small", SampleItems(), "--limit", "8", "--against", SampleModel(),
       "--items", folder / "items.jsonl"},
      {"run", folder / "small", "-p", "Question: ", "-n", "4"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "--blocks", "6", "--block",
       "64", "--keep", "6", "-o", folder / "other"}};
  for (Arguments command : commands) {
    command.insert(command.end(), {"--json", "-q"});
    const ProgramResult result = RunWinnow(command);
    ASSERT_EQ(result.exit_code, 0) << command[0] << ": " << result.err;
    const Json json = ParseJson(result.out, command[0]);
    EXPECT_TRUE(json.is_object()) << command[0];
    EXPECT_TRUE(json.value("schema", "").starts_with("winnow.")) << command[0];
    EXPECT_EQ(result.err, "") << command[0] << " with -q";
  }
}

TEST(Contract, DamagedModelsAreRefusedAndLeaveNothing) {
  const TemporaryFolder folder;
  const std::string model = CopyModel(folder);
  fs::resize_file(fs::path(model) / "model.safetensors", 4'000'000);
  ExpectRefusal(RunWinnow({"inspect", model}), kModel);
  ExpectRefusal(RunWinnow({"run", model, "-p", "x"}), kModel);
  ExpectRefusal(
      RunWinnow({"observe", model, "--calib", CalibrationText("math"), "-o", folder / "stats"}),
      kModel);
  ExpectRefusal(RunWinnow({"compress", model, "--calib", CalibrationText("math"), "--keep", "6",
                           "-o", folder / "small"}),
                kModel);
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"model"});
}

TEST(Contract, ConfigsThatContradictTheWeightsAreRefused) {
  const TemporaryFolder folder;
  const std::string model = CopyModel(folder);
  const fs::path path = fs::path(model) / "config.json";
  const Json original = ParseJson(ReadFolder(model)["config.json"], "config.json");
  const std::vector<std::pair<std::string, Json>> changes = {
      {"num_hidden_layers", 5}, {"hidden_size", 64},        {"num_local_experts", 9},
      {"vocab_size", -1},       {"num_experts_per_tok", 0}, {"intermediate_size", "wide"},
      {"model_type", "mamba"},  {"num_hidden_layers", 1e18}};
  for (const auto& [key, value] : changes) {
    Json config = original;
    config[key] = value;
    WriteText(path.string(), config.dump());
    const ProgramResult result = RunWinnow({"inspect", model});
    EXPECT_EQ(result.exit_code, kModel) << key << ": " << result.err;
    EXPECT_NE(result.err.find("error: "), std::string::npos) << key;
  }
}

TEST(Contract, DryRunsTellWhatTheyWouldTakeAndWriteNothing) {
  const TemporaryFolder folder;
  const Arguments calibration = {"--calib", CalibrationText("math"), "--blocks", "6", "--block",
                                 "64"};
  const std::string stats = folder / "stats", plan = folder / "plan.json";
  Arguments observe = {"observe", SampleModel(), "-o", stats, "-q"};
  observe.insert(observe.end(), calibration.begin(), calibration.end());
  ASSERT_EQ(RunWinnow(observe).exit_code, 0);
  ASSERT_EQ(RunWinnow({"plan", stats, "--keep", "6", "-o", plan, "-q"}).exit_code, 0);
  const std::vector<std::string> before = ListFolder(folder.path());
  const std::vector<Arguments> commands = {
      {"observe", SampleModel(), "-o", folder / "other"},
      {"compress", SampleModel(), "--keep", "6", "-o", folder / "small"},
      {"apply", SampleModel(), "--plan", plan, "-o", folder / "small"},
      {"quantize", SampleModel(), "--experts", "4bit", "-o", folder / "small"},
      {"eval", "ppl", SampleModel(), "--text", EvaluationText("math"), "--tokens", "512"},
      {"eval", "tasks", SampleModel(), SampleItems(), "--items", folder / "items.jsonl"}};
  for (size_t i = 0; i < commands.size(); ++i) {
    Arguments command = commands[i];
    if (i < 2) command.insert(command.end(), calibration.begin(), calibration.end());
    command.insert(command.end(), {"--dry-run", "--json", "-q"});
    const ProgramResult result = RunWinnow(command);
    ASSERT_EQ(result.exit_code, 0) << command[0] << ": " << result.err;
    const Json json = ParseJson(result.out, command[0]);
    EXPECT_EQ(json.value("schema", ""), "winnow.dry-run/1") << command[0];
    ASSERT_FALSE(json["memory"].empty()) << command[0];
    EXPECT_GT(json["memory"][0]["bytes"].get<int64_t>(), 1'000'000) << command[0];
  }
  EXPECT_EQ(ListFolder(folder.path()), before);
}

TEST(Contract, WrongNumbersAreNamedWithTheirBound) {
  const ProgramResult word = RunWinnow({"plan", "stats", "--keep", "six"});
  ExpectRefusal(word, kUsage);
  EXPECT_NE(word.err.find("\"six\" is not a whole number of 1 or more"), std::string::npos)
      << word.err;
  const ProgramResult share = RunWinnow({"plan", "stats", "--ratio", "1.5"});
  ExpectRefusal(share, kUsage);
  EXPECT_NE(share.err.find("from 0.001 to 0.999"), std::string::npos) << share.err;
}

TEST(Contract, EveryVerbKeepsABudget) {
  for (const Arguments& command :
       {Arguments{"inspect", SampleModel()}, Arguments{"tokenize", SampleModel(), "-p", "x"}}) {
    Arguments small = command;
    small.insert(small.end(), {"--max-memory", "1M"});
    ExpectRefusal(RunWinnow(small), kResource);
    Arguments enough = command;
    enough.insert(enough.end(), {"--max-memory", "200M"});
    EXPECT_EQ(RunWinnow(enough).exit_code, 0) << command[0];
  }
}

TEST(Contract, ExistingOutputsAreKeptWithoutForce) {
  const TemporaryFolder folder;
  const std::string stats = folder / "stats";
  fs::create_directory(stats);
  WriteText(stats + "/mine.txt", "precious");
  const Arguments observe = {"observe",  SampleModel(), "--calib", CalibrationText("math"),
                             "--blocks", "2",           "--block", "64",
                             "-o",       stats};
  const ProgramResult refused = RunWinnow(observe);
  ExpectRefusal(refused, kUsage);
  EXPECT_NE(refused.err.find("--force"), std::string::npos) << refused.err;
  EXPECT_EQ(ReadFolder(stats).at("mine.txt"), "precious");
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"stats"});
}

TEST(Contract, WhatDoesNotFitTheBudgetIsRefusedBeforehand) {
  const TemporaryFolder folder;
  const Arguments commands[] = {
      {"observe", SampleModel(), "--calib", CalibrationText("math"), "--blocks", "8", "-o",
       folder / "stats", "--max-memory", "26M"},
      {"run", SampleModel(), "-p", "x", "--max-memory", "26M"},
      {"eval", "ppl", SampleModel(), "--text", EvaluationText("math"), "--max-memory", "26M"},
      {"eval", "tasks", SampleModel(), SampleItems(), "--max-memory", "26M"},
      {"compress", SampleModel(), "--calib", CalibrationText("math"), "--blocks", "8", "--keep",
       "6", "-o", folder / "small", "--max-memory", "26M"}};
  for (const Arguments& command : commands) {
    const ProgramResult result = RunWinnow(command);
    EXPECT_EQ(result.exit_code, kResource) << command[0] << ": " << result.err;
    EXPECT_NE(result.err.find("--max-memory"), std::string::npos) << result.err;
    EXPECT_EQ(result.out, "") << command[0];
  }
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{});
}

// --force replaces what winnow wrote and nothing else; a trailing slash is no other name.
TEST(Contract, ForceReplacesOnlyOurOwn) {
  const TemporaryFolder folder;
  const auto observe = [&](const std::string& output) {
    return RunWinnow({"observe", SampleModel(), "--calib", CalibrationText("math"), "--blocks", "2",
                      "-q", "--force", "-o", output});
  };
  EXPECT_EQ(observe(folder / "stats/").exit_code, 0);
  EXPECT_EQ(observe(folder / "stats/").exit_code, 0);
  EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"stats"});
  fs::create_directory(folder / "precious");
  WriteText(folder / "precious/thesis", "text");
  EXPECT_EQ(observe(folder / "precious").exit_code, kUsage);
  EXPECT_TRUE(fs::exists(folder / "precious/thesis"));
  EXPECT_EQ(observe(folder / "precious/thesis").exit_code, kUsage);  // a file where a folder goes
  EXPECT_EQ(observe(SampleModel()).exit_code, kUsage);
  EXPECT_EQ(observe(SampleModel() + "/stats").exit_code, kUsage);
  EXPECT_EQ(observe("").exit_code, kUsage);
}

TEST(Contract, PlansForAnotherModelAreRefused) {
  const TemporaryFolder folder;
  const std::string kept =
      "{\"layer\": 0, \"kept\": [0, 1]}, {\"layer\": 1, \"kept\": [0, 1]}, "
      "{\"layer\": 2, \"kept\": [0, 1]}, ";
  const std::pair<std::string, int> plans[] = {
      {"not json", kModel},
      {R"({"schema": "winnow.plan/1", "model": {"model_type": "olmoe"}, "layers": []})", kUsage},
      {R"({"schema": "winnow.plan/1", "model": {"model_type": "mixtral"}, "layers": [)" + kept +
           R"({"layer": 3, "kept": [0, 99]}]})",
       kUsage},
      {R"({"schema": "winnow.plan/1", "model": {"model_type": "mixtral"}, "layers": [)" + kept +
           R"({"layer": 3, "kept": [0]}]})",
       kUsage},
      {R"({"schema": "winnow.plan/1", "model": {"model_type": "mixtral"}, "lairs": []})", kModel}};
  for (const auto& [text, exit_code] : plans) {
    WriteText(folder / "plan.json", text);
    const ProgramResult result =
        RunWinnow({"apply", SampleModel(), "--plan", folder / "plan.json", "-o", folder / "out"});
    EXPECT_EQ(result.exit_code, exit_code) << text << "\n" << result.err;
    EXPECT_NE(result.err.find("error: "), std::string::npos) << result.err;
    EXPECT_EQ(ListFolder(folder.path()), std::vector<std::string>{"plan.json"});
  }
}

// Figures of the table are those of the items' file, which is the same for any number of threads.
TEST(Contract, TasksSayWhatEachItemScored) {
  const TemporaryFolder folder;
  const auto run = [&](const std::string& items, const std::string& threads) {
    return RunWinnow({"eval", "tasks", SampleModel(), SampleItems(), "--limit", "30", "--items",
                      folder / items, "-t", threads, "--json", "-q"});
  };
  const ProgramResult one = run("1.jsonl", "1");
  ASSERT_EQ(one.exit_code, 0) << one.err;
  ASSERT_EQ(run("2.jsonl", "2").exit_code, 0);
  ASSERT_EQ(run("3.jsonl", "3").exit_code, 0);
  const auto files = ReadFolder(folder.path());
  EXPECT_EQ(files.at("2.jsonl"), files.at("1.jsonl"));
  EXPECT_EQ(files.at("3.jsonl"), files.at("1.jsonl"));
  const Json json = ParseJson(one.out, "eval tasks");
  EXPECT_EQ(json["schema"], "winnow.eval-tasks/1");
  ASSERT_EQ(json["tasks"].size(), 1u);
  EXPECT_EQ(json["tasks"][0]["items"], 30);
  double right = 0;
  std::istringstream lines(files.at("1.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json item = ParseJson(line, "item");
    const auto sums = item["log_likelihoods"].get<std::vector<double>>();
    ASSERT_EQ(sums.size(), 4u);
    const auto best = std::max_element(sums.begin(), sums.end()) - sums.begin();
    EXPECT_EQ(item["answers"]["acc"], best);
    if (item["gold"] == best) ++right;
  }
  EXPECT_NEAR(json["tasks"][0]["acc"]["value"].get<double>(), right / 30, 1e-12);
  // An output that is there stays, and what cannot be scored is refused before any work.
  ExpectRefusal(run("1.jsonl", "1"), kUsage);
  WriteText(folder / "bad.jsonl", R"({"task": "t", "query": "Q", "choices": ["a"], "gold": 0})");
  ExpectRefusal(RunWinnow({"eval", "tasks", SampleModel(), folder / "bad.jsonl"}), kModel);
  WriteText(folder / "none.jsonl", "");
  ExpectRefusal(RunWinnow({"eval", "tasks", SampleModel(), folder / "none.jsonl"}), kUsage);
  ExpectRefusal(RunWinnow({"eval", "tasks", SampleModel(), SampleItems(), SampleItems()}), kUsage);
  ExpectRefusal(RunWinnow({"eval", "tasks", SampleModel(), SampleItems(), "--max-length", "9"}),
                kUsage);
}

TEST(Contract, AHandWrittenPlanIsEnough) {
  const TemporaryFolder folder;
  std::string layers;
  for (int i = 0; i < 4; ++i) {
    layers += (i > 0 ? ", " : "") + ("{\"layer\": " + std::to_string(i) + ", \"kept\": [1, 2, 7]}");
  }
  WriteText(folder / "plan.json",
            R"({"schema": "winnow.plan/1", "model": {"model_type": "mixtral"}, "layers": [)" +
                layers + "]}");
  const ProgramResult result = RunWinnow(
      {"apply", SampleModel(), "--plan", folder / "plan.json", "-o", folder / "out", "-q"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const ProgramResult text = RunWinnow({"run", folder / "out", "-p", "The", "-n", "4", "-q"});
  EXPECT_EQ(text.exit_code, 0) << text.err;
}

}  // namespace
}  // namespace winnow::test
