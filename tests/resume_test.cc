// Interrupted runs: killed or stopped at any moment, what is under the final name is complete or
// not there, and --resume ends with the bytes of a run nobody disturbed. The moments here are those
// at which files appear; tools/kill_resume.py takes random ones on larger models.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "run_program.h"

namespace winnow::test {
namespace {

Arguments Observe(const std::string& out) {
  return {"observe",
          SampleModel(),
          "--calib",
          CalibrationText("prose"),
          CalibrationText("math"),
          "--blocks",
          "16",
          "--block",
          "128",
          "--stats",
          "full",
          "--checkpoint-seconds",
          "0",
          "-q",
          "-o",
          out};
}

Arguments With(Arguments arguments, const std::string& flag) {
  arguments.push_back(flag);
  return arguments;
}

size_t CountFiles(const fs::path& folder) {
  std::error_code error;
  size_t count = 0;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    ++count;
  }
  return count;
}

TEST(Resume, ObserveKilledWhenFilesAppearEndsWithTheSameBytes) {
  const TemporaryFolder folder;
  ASSERT_EQ(RunWinnow(Observe(folder / "undisturbed")).exit_code, 0);
  const auto expected = ReadFolder(folder / "undisturbed");
  ASSERT_FALSE(expected.empty());
  int killed = 0;
  for (size_t files = 1; files <= expected.size() + 1; ++files) {
    const std::string out = folder / ("killed-" + std::to_string(files));
    const ProgramResult first = RunWinnowUntil(
        Observe(out), SIGKILL, [&] { return CountFiles(out + ".partial") >= files; });
    if (first.signal == SIGKILL) {
      ++killed;
      ASSERT_FALSE(fs::exists(out)) << "half-written under its final name";
      const ProgramResult again = RunWinnow(Observe(out));
      EXPECT_EQ(again.exit_code, 2) << "starting over silently would lose the work";
      const ProgramResult resumed = RunWinnow(With(Observe(out), "--resume"));
      ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    }
    EXPECT_TRUE(ReadFolder(out) == expected) << "killed at " << files << " files";
    EXPECT_FALSE(fs::exists(out + ".partial"));
  }
  EXPECT_GT(killed, 0);
}

TEST(Resume, InterruptKeepsTheWorkAndSaysHowToGoOn) {
  const TemporaryFolder folder;
  ASSERT_EQ(RunWinnow(Observe(folder / "undisturbed")).exit_code, 0);
  const std::string out = folder / "stopped";
  const ProgramResult stopped =
      RunWinnowUntil(Observe(out), SIGINT, [&] { return CountFiles(out + ".partial") >= 2; });
  if (stopped.exit_code != 0) {  // else it was faster than the signal
    EXPECT_EQ(stopped.exit_code, 130) << stopped.err;
    EXPECT_NE(stopped.err.find("--resume"), std::string::npos) << stopped.err;
    EXPECT_FALSE(fs::exists(out));
    ASSERT_EQ(RunWinnow(With(Observe(out), "--resume")).exit_code, 0);
  }
  EXPECT_TRUE(ReadFolder(out) == ReadFolder(folder / "undisturbed"));
}

TEST(Resume, AnotherTextOrFlagIsNotMixedIn) {
  const TemporaryFolder folder;
  const std::string out = folder / "stats";
  const ProgramResult first =
      RunWinnowUntil(Observe(out), SIGKILL, [&] { return CountFiles(out + ".partial") >= 2; });
  if (first.signal != SIGKILL) GTEST_SKIP() << "finished before it could be killed";
  const auto with_other_text = [](const std::string& path) {
    Arguments other = Observe(path);
    other[4] = CalibrationText("other");
    return other;
  };
  const ProgramResult resumed = RunWinnow(With(with_other_text(out), "--resume"));
  if (resumed.exit_code != 0) {  // a refusal is as good as starting over
    EXPECT_EQ(resumed.exit_code, 2) << resumed.err;
    EXPECT_FALSE(fs::exists(out));
    return;
  }
  ASSERT_EQ(RunWinnow(with_other_text(folder / "undisturbed")).exit_code, 0);
  EXPECT_TRUE(ReadFolder(out) == ReadFolder(folder / "undisturbed"));
}

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Weights, log and curve, killed once the log has so many bytes.
TEST(Resume, FinetuneKilledEndsWithTheSameBytes) {
  const TemporaryFolder folder;
  const auto finetune = [&](const std::string& out) {
    return Arguments{"finetune",
                     SampleModel(),
                     "--data",
                     CalibrationText("prose"),
                     "--train",
                     "router,norms",
                     "--block",
                     "64",
                     "--batch",
                     "2",
                     "--steps",
                     "5",
                     "--eval-every",
                     "2",
                     "--log",
                     out + ".jsonl",
                     "--curve",
                     out + ".svg",
                     "-q",
                     "--checkpoint-seconds",
                     "0",
                     "-o",
                     out};
  };
  const std::string whole = folder / "undisturbed";
  const ProgramResult undisturbed = RunWinnow(finetune(whole));
  ASSERT_EQ(undisturbed.exit_code, 0) << undisturbed.err;
  const auto expected = ReadFolder(whole);
  for (const size_t bytes : {size_t{1}, size_t{300}}) {
    const std::string out = folder / ("killed-" + std::to_string(bytes));
    const ProgramResult first = RunWinnowUntil(finetune(out), SIGKILL, [&] {
      return fs::exists(out + ".jsonl") && fs::file_size(out + ".jsonl") >= bytes;
    });
    if (first.signal == SIGKILL) {
      ASSERT_FALSE(fs::exists(out)) << "half-written under its final name";
      EXPECT_EQ(RunWinnow(finetune(out)).exit_code, 2) << "starting over would lose the work";
      const ProgramResult resumed = RunWinnow(With(finetune(out), "--resume"));
      ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    }
    EXPECT_TRUE(ReadFolder(out) == expected) << bytes;
    EXPECT_EQ(ReadText(out + ".jsonl"), ReadText(whole + ".jsonl"));
    EXPECT_EQ(ReadText(out + ".svg"), ReadText(whole + ".svg"));
    EXPECT_FALSE(fs::exists(out + ".finetune"));
  }
}

TEST(Resume, ApplyKilledEndsWithTheSameBytes) {
  const TemporaryFolder folder;
  ASSERT_EQ(RunWinnow(Observe(folder / "stats")).exit_code, 0);
  ASSERT_EQ(RunWinnow({"plan", folder / "stats", "--keep", "5", "-o", folder / "plan.json", "-q"})
                .exit_code,
            0);
  const auto apply = [&](const std::string& out) {
    return Arguments{"apply", SampleModel(), "--plan", folder / "plan.json", "-q", "-o", out};
  };
  ASSERT_EQ(RunWinnow(apply(folder / "undisturbed")).exit_code, 0);
  const auto expected = ReadFolder(folder / "undisturbed");
  for (size_t files = 1; files <= expected.size(); ++files) {
    const std::string out = folder / ("killed-" + std::to_string(files));
    const ProgramResult first =
        RunWinnowUntil(apply(out), SIGKILL, [&] { return CountFiles(out + ".partial") >= files; });
    if (first.signal == SIGKILL && !fs::exists(out)) {
      const ProgramResult resumed = RunWinnow(With(apply(out), "--resume"));
      ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    }
    EXPECT_TRUE(ReadFolder(out) == expected) << "killed at " << files << " files";
  }
}

}  // namespace
}  // namespace winnow::test
