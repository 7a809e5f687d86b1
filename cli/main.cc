// The winnow program: a table of verbs, error messages and exit codes.
#include <fmt/format.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <new>

#include "base/error.h"
#include "session.h"

namespace winnow::cli {
namespace {

void OnInterrupt(int) {
  if (g_end_on_interrupt) {
    constexpr char kMessage[] = "\nerror: interrupted\n";
    [[maybe_unused]] const auto written = write(STDERR_FILENO, kMessage, sizeof(kMessage) - 1);
    std::_Exit(static_cast<int>(ExitCode::kInterrupted));
  }
  if (g_interrupted.exchange(true)) std::_Exit(static_cast<int>(ExitCode::kInterrupted));
}

void PrintError(const std::string& message, const std::string& hint) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  if (!hint.empty()) std::fprintf(stderr, "hint: %s\n", hint.c_str());
}

std::vector<std::string> KnownNames(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(verb->get_name());
  }
  return names;
}

// Flags are accepted with `_` for `-`, as research scripts write them.
std::vector<std::string> NormalizedArguments(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  for (std::string& argument : arguments) {
    if (argument.rfind("--", 0) != 0) continue;
    const size_t end = std::min(argument.find('='), argument.size());
    std::replace(argument.begin(), argument.begin() + static_cast<std::ptrdiff_t>(end), '_', '-');
  }
  std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them from the back
  return arguments;
}

int ReportUsage(const CLI::App& app, const CLI::ParseError& problem) {
  const CLI::App* verb = &app;
  std::string name = "winnow";
  while (!verb->get_subcommands().empty()) {
    verb = verb->get_subcommands().front();
    name += " " + verb->get_name();
  }
  std::string hint = fmt::format("see {} -h", name);
  // A misspelt flag is named before the flag that is missing because of it.
  const bool lacks_verb = !verb->get_subcommands([](const CLI::App*) { return true; }).empty();
  std::string wrong, word;
  for (const std::string& extra : verb->remaining(true)) {
    if (word.empty() && extra.rfind('-', 0) != 0) word = extra;
    if (wrong.empty() || (wrong.rfind('-', 0) != 0 && extra.rfind('-', 0) == 0)) wrong = extra;
  }
  if (lacks_verb && !word.empty()) wrong = word;
  const bool extras = dynamic_cast<const CLI::ExtrasError*>(&problem) != nullptr;
  if (extras && wrong.empty()) {
    // Nothing is left over of the verb itself, so it stood before the verb.
    for (const std::string& extra : app.remaining(true)) {
      if (wrong.empty() || (wrong.rfind('-', 0) != 0 && extra.rfind('-', 0) == 0)) wrong = extra;
    }
    PrintError(fmt::format("{} stands before the verb", wrong),
               fmt::format("flags follow the verb: {} ... {}", name, wrong));
    return static_cast<int>(ExitCode::kUsage);
  }
  if (!wrong.empty() && (extras || lacks_verb || wrong.rfind('-', 0) == 0)) {
    const std::string near = Suggest(wrong.substr(0, wrong.find('=')), KnownNames(*verb));
    if (!near.empty()) hint = fmt::format("did you mean {}?", near);
    const char* what = lacks_verb && wrong.rfind('-', 0) != 0 ? "verb" : "argument";
    PrintError(fmt::format("unknown {} {}", what, wrong), hint);
  } else {
    PrintError(problem.what(), hint);
  }
  return static_cast<int>(ExitCode::kUsage);
}

// What a full disk or a closed pipe kept back is lost; scripts must not take it for the result.
void FinishOutput() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    throw RuntimeError("cannot write to standard output",
                       "check that its disk has space and its reader is still there");
  }
}

// Without SA_RESTART, so that a read that waits comes back and the flag is looked at.
void CatchInterrupts() {
  struct sigaction action = {};
  action.sa_handler = OnInterrupt;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

int Main(int argc, char** argv) {
  // Large buffers come from the kernel and go back to it, so that RSS is what is held.
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 20);
  CatchInterrupts();
  Session session;
  CLI::App app{"winnow: fit a Mixture-of-Experts language model to the machine you have", "winnow"};
  app.set_version_flag("--version", "winnow " WINNOW_VERSION);
  app.set_help_flag("-h,--help", "Help");
  app.require_subcommand(0, 1);
  app.footer(
      "The workflow: inspect -> observe -> plan -> apply -> eval, or compress for all of it.\n"
      "Example: winnow compress MODEL --keep 6 --calib text.txt -o SMALLER\n"
      "Help on a verb: winnow VERB -h");
  AddInspect(app, session);
  AddDoctor(app, session);
  AddObserve(app, session);
  AddPlan(app, session);
  AddApply(app, session);
  AddEval(app, session);
  AddCompress(app, session);
  AddFinetune(app, session);
  AddQuantize(app, session);
  AddRun(app, session);
  AddServe(app, session);
  AddBench(app, session);
  AddTokenize(app, session);
  AddTrace(app, session);
  AddStats(app, session);
  for (CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
    verb->set_help_flag("-h,--help", "Help");
  }
  try {
    app.parse(NormalizedArguments(argc, argv));
    if (!session.action) {
      std::printf("%s", app.help().c_str());
      return 0;
    }
    const int code = session.action();
    session.FinishProgress();
    FinishOutput();
    return code;
  } catch (const CLI::CallForHelp&) {
    const auto verbs = app.get_subcommands();
    std::printf("%s",
                (verbs.empty() ? app.help() : app.help("", CLI::AppFormatMode::Normal)).c_str());
    return 0;
  } catch (const CLI::CallForVersion&) {
    std::printf("winnow %s\n", WINNOW_VERSION);
    return 0;
  } catch (const CLI::ParseError& problem) {
    return ReportUsage(app, problem);
  } catch (const Error& error) {
    session.FinishProgress();
    PrintError(error.what(), error.hint());
    return static_cast<int>(error.exit_code());
  } catch (const std::bad_alloc&) {
    session.FinishProgress();
    PrintError("out of memory", "give a smaller --max-memory, so that the work is planned for it");
    return static_cast<int>(ExitCode::kResource);
  } catch (const std::filesystem::filesystem_error& error) {
    session.FinishProgress();
    PrintError(error.path1().empty() ? std::string(error.what())
                                     : fmt::format("cannot use {}: {}", error.path1().string(),
                                                   error.code().message()),
               "check the path, its permissions and the space on its disk");
    return static_cast<int>(ExitCode::kRuntime);
  } catch (const std::exception& error) {
    session.FinishProgress();
    PrintError(fmt::format("internal: {}", error.what()),
               "this is a defect of winnow; please report it");
    return static_cast<int>(ExitCode::kRuntime);
  }
}

}  // namespace
}  // namespace winnow::cli

int main(int argc, char** argv) {
  return winnow::cli::Main(argc, argv);
}
