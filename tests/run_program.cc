#include "run_program.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <thread>

extern char** environ;

namespace winnow::test {
namespace {

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Output goes to files: a pipe nobody reads would stop the program when it is full.
pid_t Spawn(const Arguments& arguments, const std::string& in, const std::string& out,
            const std::string& err) {
  std::vector<char*> argv;
  std::string program = WINNOW_PROGRAM;
  argv.push_back(program.data());
  std::vector<std::string> copies = arguments;
  for (std::string& argument : copies) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, in.c_str(), O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), O_WRONLY | O_CREAT, 0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), O_WRONLY | O_CREAT, 0600);
  pid_t child = -1;
  const int error = posix_spawn(&child, program.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  EXPECT_EQ(error, 0) << "cannot run " << program;
  return error == 0 ? child : -1;
}

}  // namespace

ProgramResult RunWinnowUntil(const Arguments& arguments, int signal,
                             const std::function<bool()>& when, const std::string& input) {
  ProgramResult result;
  const TemporaryFolder folder;
  std::ofstream(folder / "in", std::ios::binary) << input;
  const pid_t child = Spawn(arguments, folder / "in", folder / "out", folder / "err");
  if (child < 0) return result;
  int status = 0;
  if (when) {
    bool sent = false;
    while (waitpid(child, &status, WNOHANG) == 0) {
      if (!sent && when()) {
        kill(child, signal);
        sent = true;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  } else {
    waitpid(child, &status, 0);
  }
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) result.signal = WTERMSIG(status);
  result.out = ReadFile(folder / "out");
  result.err = ReadFile(folder / "err");
  return result;
}

ProgramResult RunWinnow(const Arguments& arguments, const std::string& input) {
  return RunWinnowUntil(arguments, 0, nullptr, input);
}

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (fs::temp_directory_path() / "winnow-test-XXXXXX").string();
  path_ = mkdtemp(pattern.data());
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::map<std::string, std::string> ReadFolder(const fs::path& folder) {
  std::map<std::string, std::string> files;
  if (!fs::is_directory(folder)) return files;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    files[fs::relative(entry.path(), folder).string()] = ReadFile(entry.path());
  }
  return files;
}

std::vector<std::string> ListFolder(const fs::path& folder) {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string SampleModel() {
  return WINNOW_SOURCE_DIR "/examples/sample-mixtral";
}

std::string CalibrationText(const std::string& domain) {
  return WINNOW_SOURCE_DIR "/examples/text/" + domain + ".calib.txt.xz";
}

std::string EvaluationText(const std::string& domain) {
  return WINNOW_SOURCE_DIR "/examples/text/" + domain + ".eval.txt.xz";
}

}  // namespace winnow::test
