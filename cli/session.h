// What every verb of the command line shares: common flags, progress on stderr, results on stdout,
// Ctrl-C. Only cli/ prints; the library reports through JobControl and exceptions.
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"         // fs
#include "base/json.h"         // Json, OrderedJson
#include "base/memory.h"       // MemoryPlan
#include "base/progress.h"     // JobControl
#include "base/thread_pool.h"  // ThreadPool
#include "kernels/matmul.h"    // ComputePrecision

namespace winnow::cli {

struct CommonFlags {
  int threads = 0;
  std::string max_memory;
  std::string compute = "auto";
  std::string isa;
  bool json = false;
  bool quiet = false;
  bool verbose = false;
  bool dry_run = false;
  bool force = false;
  bool resume = false;
};

// Prints one progress line on a terminal, a plain line per layer otherwise.
class ProgressPrinter {
 public:
  explicit ProgressPrinter(const CommonFlags& flags);
  void Update(const ProgressEvent& event);
  // Ends the line so that other output starts clean.
  void Finish();

 private:
  const CommonFlags& flags_;
  bool terminal_;
  bool line_open_ = false;
  std::string stage_;
  int64_t printed_layer_ = -1;
  int64_t first_work_ = 0;
  std::chrono::steady_clock::time_point stage_start_, last_print_;
};

// State of one run of the program, passed to the verb that was chosen.
class Session {
 public:
  Session();
  CommonFlags flags;
  std::function<int()> action;  // set by the verb on the command line

  ThreadPool& pool();
  const JobControl& control() const { return control_; }
  ComputePrecision compute() const;
  // --max-memory or its default.
  uint64_t memory_budget() const;
  // Prints the plan with -v or --dry-run and refuses (exit 4) what does not fit.
  void RequireMemory(const MemoryPlan& plan, const std::string& verb);
  // The answer of --dry-run --json: the memory plans so far, and what else the verb knows of its
  // work.
  void PrintDryRun(const std::string& verb, const OrderedJson& work = OrderedJson::object());

  // Messages to stderr (not with -q), data to stdout.
  void Note(const std::string& text);
  void Warn(const std::string& text);
  void Print(const std::string& text);
  void PrintJson(const OrderedJson& value);
  void FinishProgress() { progress_.Finish(); }
  // "peak memory 180 MiB, read 13.8 GiB, 302 s", to stderr.
  void PrintUsage();
  double seconds() const;

  // Groups of flags a verb may take.
  void AddComputeFlags(CLI::App& verb);
  void AddMemoryFlag(CLI::App& verb);  // --max-memory alone, for verbs that multiply nothing
  void AddOutputFlags(CLI::App& verb, bool resumable);
  void AddReportFlags(CLI::App& verb);  // --json, -q, -v

 private:
  std::chrono::steady_clock::time_point start_;
  std::unique_ptr<ThreadPool> pool_;
  OrderedJson memory_plans_ = OrderedJson::array();
  ProgressPrinter progress_;
  JobControl control_;
};

// Ctrl-C sets this; polled by long computations.
extern std::atomic<bool> g_interrupted;
// While one lives, Ctrl-C ends the program at once: for work that polls nothing and leaves nothing
// behind, such as reading text.
class EndOnInterrupt {
 public:
  EndOnInterrupt();
  ~EndOnInterrupt();
  EndOnInterrupt(const EndOnInterrupt&) = delete;
  EndOnInterrupt& operator=(const EndOnInterrupt&) = delete;
};
extern std::atomic<bool> g_end_on_interrupt;

// Checks of numbers whose messages name the bound instead of the limits of a type.
CLI::Validator WholeNumberFrom(int64_t least);
CLI::Validator NumberFromTo(double least, double most);

enum class OutputKind { kFile, kFolder };
// Refuses, before any work: an existing output unless --force (then it is replaced at the end, not
// before, and only if winnow wrote it), a path of the other kind, and a folder that is, holds or
// lies in `model`. `resumable`: whether the verb can go on from what an interrupted run has left.
void RequireFreshOutput(const std::string& path, OutputKind kind, const CommonFlags& flags,
                        const std::string& model = "", bool resumable = true);
// A folder of unfinished work beside an output, OUT.work or OUT.rounds: refuses one that holds
// anything `is_ours` does not know, and one that is left over without --resume or --force.
void ClaimWorkFolder(const fs::path& folder, const CommonFlags& flags,
                     const std::function<bool(const std::string& name)>& is_ours);
// "stats-of-12" with the prefix "stats-of-": a number and nothing else behind it, or ".partial".
bool IsNumbered(std::string name, const std::string& prefix);
// For -o: without trailing slashes, so that OUT.partial lies beside OUT; refuses nothing at all.
std::string OutputPath(std::string path);

// The option of `known` that is nearest to `wrong`, empty if none is near.
std::string Suggest(const std::string& wrong, const std::vector<std::string>& known);

// One function per verb, each in cmd_<verb>.cc: declares its flags and sets session.action.
void AddInspect(CLI::App& app, Session& session);
void AddDoctor(CLI::App& app, Session& session);
void AddTokenize(CLI::App& app, Session& session);
void AddTrace(CLI::App& app, Session& session);
void AddRun(CLI::App& app, Session& session);
void AddServe(CLI::App& app, Session& session);
void AddBench(CLI::App& app, Session& session);
void AddObserve(CLI::App& app, Session& session);
void AddStats(CLI::App& app, Session& session);
void AddPlan(CLI::App& app, Session& session);
void AddApply(CLI::App& app, Session& session);
void AddEval(CLI::App& app, Session& session);
void AddCompress(CLI::App& app, Session& session);
void AddFinetune(CLI::App& app, Session& session);
void AddQuantize(CLI::App& app, Session& session);

}  // namespace winnow::cli
