// The one exception hierarchy of Winnow. Library code throws these; cli/ turns them into
// `error:` and `hint:` lines and an exit code. what() says what is wrong and where (file, tensor,
// expected, got); hint() says what the user can do about it and may be empty.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace winnow {

// Exit codes are part of the command line's contract (docs/FORMATS.md).
enum class ExitCode : int {
  kOk = 0,
  kRuntime = 1,
  kUsage = 2,
  kModel = 3,
  kResource = 4,
  kQuality = 5,
  kInterrupted = 130,
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode exit_code, const std::string& message, std::string hint)
      : std::runtime_error(message), hint_(std::move(hint)), exit_code_(exit_code) {}
  const std::string& hint() const { return hint_; }
  ExitCode exit_code() const { return exit_code_; }

 private:
  std::string hint_;
  ExitCode exit_code_;
};

// Something failed while running: a read error, a full disk seen too late, an internal limit.
class RuntimeError : public Error {
 public:
  explicit RuntimeError(const std::string& message, std::string hint = {})
      : Error(ExitCode::kRuntime, message, std::move(hint)) {}
};

// The request itself makes no sense: a flag, a plan that does not fit the model, text too short.
class UsageError : public Error {
 public:
  explicit UsageError(const std::string& message, std::string hint = {})
      : Error(ExitCode::kUsage, message, std::move(hint)) {}
};

// A checkpoint, tokenizer, plan or statistics file is damaged or unsupported.
class ModelError : public Error {
 public:
  explicit ModelError(const std::string& message, std::string hint = {})
      : Error(ExitCode::kModel, message, std::move(hint)) {}
};

// The work would need more memory or disk than there is or than --max-memory allows.
class ResourceError : public Error {
 public:
  explicit ResourceError(const std::string& message, std::string hint = {})
      : Error(ExitCode::kResource, message, std::move(hint)) {}
};

// A quality gate the user set is not met.
class QualityError : public Error {
 public:
  explicit QualityError(const std::string& message, std::string hint = {})
      : Error(ExitCode::kQuality, message, std::move(hint)) {}
};

// Ctrl-C: work stopped at a safe point, what was finished is kept.
class InterruptedError : public Error {
 public:
  explicit InterruptedError(const std::string& message, std::string hint = {})
      : Error(ExitCode::kInterrupted, message, std::move(hint)) {}
};

}  // namespace winnow
