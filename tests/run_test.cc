// Text out of a model: continuing, conversations, where a text ends, and how fast it goes.
#include <gtest/gtest.h>

#include <fstream>

#include "base/json.h"  // ParseJson
#include "run_program.h"

namespace winnow::test {
namespace {

// The sample with a chat template, which it was never trained on.
std::string ChattyModel(const TemporaryFolder& folder) {
  const std::string copy = folder / "model";
  fs::copy(SampleModel(), copy);
  std::ofstream(copy + "/chat_template.jinja") << "{{ bos_token }}{% for m in messages %}{{ m.role "
                                                  "}}: {{ m.content }}\n{% endfor %}assistant:";
  return copy;
}

std::string Out(const Arguments& arguments, const std::string& input = {}) {
  const ProgramResult result = RunWinnow(arguments, input);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return result.out;
}

TEST(Run, StopStringsEndTheTextBeforeThem) {
  const std::string whole = Out({"run", SampleModel(), "-p", "The old man", "-n", "40", "-q"});
  const std::string tail = whole.substr(std::string("The old man").size());
  // A stop string across two words, wherever tokens are cut.
  const size_t space = tail.find(' ', 12);
  ASSERT_NE(space, std::string::npos);
  const std::string stop = tail.substr(space - 2, 4);
  const std::string cut =
      Out({"run", SampleModel(), "-p", "The old man", "-n", "40", "-q", "--stop", stop});
  EXPECT_EQ(cut, "The old man" + tail.substr(0, tail.find(stop)) + "\n");
  EXPECT_EQ(RunWinnow({"run", SampleModel(), "-p", "x", "--stop", ""}).exit_code, 2);
}

TEST(Run, PromptsThatContradictAreRefusedWithAHint) {
  for (const Arguments& more :
       {Arguments{}, Arguments{"-p", "x", "-i"}, Arguments{"-p", "x", "--raw", "--chat"},
        Arguments{"-p", "x", "--stop", ""}}) {
    Arguments arguments = {"run", SampleModel()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const ProgramResult refused = RunWinnow(arguments);
    EXPECT_EQ(refused.exit_code, 2);
    EXPECT_NE(refused.err.find("hint: "), std::string::npos) << refused.err;
  }
}

TEST(Run, AMessageIsRenderedByTheTemplate) {
  const TemporaryFolder folder;
  const std::string model = ChattyModel(folder);
  const std::string plain =
      Out({"run", model, "-p", "system: Be brief.\nuser: Hello\nassistant:", "-n", "12", "-q"});
  const std::string chat =
      Out({"run", model, "--chat", "--system", "Be brief.", "-p", "Hello", "-n", "12", "-q"});
  EXPECT_TRUE(plain.ends_with("assistant:" + chat)) << plain << " / " << chat;
  const ProgramResult without = RunWinnow({"run", SampleModel(), "--chat", "-p", "Hello"});
  EXPECT_EQ(without.exit_code, 3);
  EXPECT_NE(without.err.find("no chat template"), std::string::npos);
  EXPECT_EQ(RunWinnow({"run", SampleModel(), "--system", "x", "-p", "Hello"}).exit_code, 2);
}

TEST(Run, AConversationGoesOnFromWhatWasSaid) {
  const TemporaryFolder folder;
  const std::string model = ChattyModel(folder);
  const Arguments talk = {"run", model, "-i", "-n", "10", "-q", "--stop", "\n"};
  const auto ask = [&](const std::string& prompt) {
    return Out({"run", model, "-p", prompt, "-n", "10", "-q", "--stop", "\n"})
        .substr(prompt.size());
  };
  const std::string first = ask("user: One\nassistant:");
  const std::string second = ask("user: One\nassistant:" + first + "user: Two\nassistant:");
  EXPECT_EQ(Out(talk, "One\nTwo\n"), first + second);
  // Forgetting, unknown commands and the end of a conversation.
  EXPECT_EQ(Out(talk, "One\n/new\n\n/bogus\nOne\n/exit\nTwo\n"), first + first);
  EXPECT_EQ(Out(talk, ""), "");
}

TEST(Run, BenchSaysWhatWasMeasuredBesideTheMachine) {
  const ProgramResult result =
      RunWinnow({"bench", SampleModel(), "-p", "16", "-n", "4", "-r", "1", "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json json = ParseJson(result.out, "bench");
  for (const char* key : {"prompt_tokens_per_second", "decode_tokens_per_second",
                          "dram_gb_per_second", "gemm_peak_gflops", "peak_rss_bytes"}) {
    EXPECT_GT(json[key].get<double>(), 0.0) << key;
  }
  EXPECT_EQ(json["experts_per_token"].get<double>(), 2.0);
  // Everything but the embedding and the six experts of each layer that a token does not use:
  // 4 layers of 8 experts of 3 x 128 x 256 weights in bf16.
  const Json inspect = ParseJson(RunWinnow({"inspect", SampleModel(), "--json"}).out, "inspect");
  EXPECT_LT(json["bytes_per_token"].get<double>(), inspect["bytes"].get<double>() / 2);
  EXPECT_EQ(RunWinnow({"bench", SampleModel(), "-p", "0", "-n", "0"}).exit_code, 2);
}

}  // namespace
}  // namespace winnow::test
