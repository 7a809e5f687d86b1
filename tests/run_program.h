// Running the winnow program in tests: arguments in; exit code, output and files out.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace winnow::test {

namespace fs = std::filesystem;

struct ProgramResult {
  int exit_code = -1;  // -1 if a signal ended it
  int signal = 0;
  std::string out;
  std::string err;
};

using Arguments = std::vector<std::string>;

// Runs build/.../winnow to its end, without a terminal; `input` is its standard input.
ProgramResult RunWinnow(const Arguments& arguments, const std::string& input = {});
// The same, but sends `signal` as soon as `when` holds (asked again and again) or not at all if the
// program ends first.
ProgramResult RunWinnowUntil(const Arguments& arguments, int signal,
                             const std::function<bool()>& when, const std::string& input = {});

// A new empty folder that disappears with the object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// Relative name -> content of every file below a folder.
std::map<std::string, std::string> ReadFolder(const fs::path& folder);
// Names directly inside a folder, sorted.
std::vector<std::string> ListFolder(const fs::path& folder);

// The bundled model and texts: "prose", "docs", "code", "math", "other".
std::string SampleModel();
std::string CalibrationText(const std::string& domain);
std::string EvaluationText(const std::string& domain);

}  // namespace winnow::test
