// Conversations through the program: rendered by a model's chat template, tokenised, calibrated and
// trained on.
#include <gtest/gtest.h>

#include <fstream>

#include "base/json.h"  // ParseJson
#include "run_program.h"

namespace winnow::test {
namespace {

class ConversationRun : public testing::Test {
 protected:
  ConversationRun() : model_(folder_ / "model"), talks_(folder_ / "talks.jsonl") {
    fs::copy(SampleModel(), model_);
    std::ofstream(model_ + "/chat_template.jinja")
        << "{{ bos_token }}{% for m in messages %}\n"
           "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}\n"
           "{% if m.role == 'user' %}[{{ m.content }}] {% else %}{{ m.content }}{{ eos_token }}"
           "{% endif %}\n"
           "{% endfor %}";
    std::ofstream talks(talks_);
    for (int i = 0; i < 40; ++i) {
      talks << R"({"messages": [{"role": "user", "content": "How many are )" << i
            << R"( and 3?"}, {"role": "assistant", "content": "It is )" << i + 3
            << R"( in the end."}]})"
            << "\n";
    }
  }
  TemporaryFolder folder_;
  std::string model_, talks_;
};

TEST_F(ConversationRun, TokenizePrintsTextIdsAndRefusals) {
  const std::string lines = folder_ / "lines.jsonl";
  std::ofstream(lines) << R"({"messages": [{"role": "user", "content": "Hi"}]})"
                       << "\n\n"
                       << R"({"messages": [{"role": "system", "content": "x"}]})"
                       << "\n";
  const ProgramResult result = RunWinnow({"tokenize", model_, "--chat", lines});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const size_t end = result.out.find('\n');
  const Json first = ParseJson(result.out.substr(0, end), "first");
  EXPECT_EQ(first["text"], "<s>[Hi] ");
  EXPECT_EQ(first["ids"][0], 1);  // BOS, once
  EXPECT_NE(first["ids"][1], 1);
  EXPECT_EQ(ParseJson(result.out.substr(end), "second"), Json({{"error", "no system turns"}}));
  EXPECT_EQ(RunWinnow({"tokenize", model_, "--chat", talks_, "--plain"}).out.substr(0, 53),
            "<s>[How many are 0 and 3?] It is 3 in the end.</s>\n<s");
  EXPECT_EQ(RunWinnow({"tokenize", model_, "--chat", lines, "--plain"}).exit_code, 3);
  EXPECT_EQ(RunWinnow({"tokenize", model_, "-p", "x", "--plain"}).exit_code, 2);
}

TEST_F(ConversationRun, AnswersAloneCountInCalibration) {
  const auto observe = [&](const std::string& text, const std::string& out) {
    return RunWinnow({"observe", model_, "--calib", text, "--blocks", "4", "--block", "64", "-o",
                      folder_ / out, "-q"});
  };
  ASSERT_EQ(observe(talks_, "stats").exit_code, 0);
  // The same texts and the same marks, as prompts with answers.
  std::ofstream pairs(folder_ / "pairs.jsonl");
  for (int i = 0; i < 40; ++i) {
    pairs << R"({"prompt": "[How many are )" << i << R"( and 3?] ", "completion": "It is )" << i + 3
          << R"( in the end.</s>"})"
          << "\n";
  }
  pairs.close();
  ASSERT_EQ(observe(folder_ / "pairs.jsonl", "stats-of-pairs").exit_code, 0);
  const auto plan = [&](const std::string& stats, const Arguments& more) {
    Arguments arguments = {"plan",
                           folder_ / stats,
                           "--method",
                           "reap",
                           "--keep",
                           "6",
                           "-q",
                           "-o",
                           folder_ / (stats + std::to_string(more.size()) + ".json")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    EXPECT_EQ(RunWinnow(arguments).exit_code, 0);
    std::ifstream file(folder_ / (stats + std::to_string(more.size()) + ".json"));
    return ParseJson(std::string(std::istreambuf_iterator<char>(file), {}), "plan")["layers"];
  };
  const Json counted = plan("stats", {});
  EXPECT_EQ(counted.size(), plan("stats-of-pairs", {}).size());
  EXPECT_NE(counted, plan("stats", {"--all-tokens"}));
}

TEST_F(ConversationRun, TrainsOnThem) {
  const ProgramResult result =
      RunWinnow({"finetune", model_,   "--data",     talks_, "--block", "64",
                 "--batch",  "8",      "--steps",    "6",    "--lr",    "1e-3",
                 "--train",  "router", "--held-out", "0",    "-o",      folder_ / "tuned",
                 "--json",   "-q"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json json = ParseJson(result.out, "result");
  EXPECT_LT(json["loss"]["last"].get<double>(), json["loss"]["first"].get<double>());
  EXPECT_TRUE(fs::exists(folder_ / "tuned/chat_template.jinja"));
}

TEST_F(ConversationRun, WithoutATemplateTheyAreRefused) {
  fs::remove(model_ + "/chat_template.jinja");
  const Arguments commands[] = {
      {"tokenize", model_, "--chat", talks_},
      {"observe", model_, "--calib", talks_, "-o", folder_ / "stats"},
      {"finetune", model_, "--data", talks_, "--train", "router", "-o", folder_ / "tuned"}};
  for (const Arguments& command : commands) {
    const ProgramResult result = RunWinnow(command);
    EXPECT_EQ(result.exit_code, 3) << command[0];
    EXPECT_NE(result.err.find("the model has no chat template"), std::string::npos) << result.err;
    EXPECT_NE(result.err.find("hint: "), std::string::npos) << result.err;
  }
  EXPECT_EQ(RunWinnow({"eval", "ppl", model_, "--text", talks_}).exit_code, 3);
}

}  // namespace
}  // namespace winnow::test
