#include "session.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>

#include "base/error.h"
#include "base/file.h"
#include "base/units.h"
#include "kernels/targets.h"

namespace winnow::cli {

// The one mutable global of the program: a signal handler has no other way to reach the
// computation.
std::atomic<bool> g_interrupted{false};
std::atomic<bool> g_end_on_interrupt{false};

EndOnInterrupt::EndOnInterrupt() {
  g_end_on_interrupt = true;
}

EndOnInterrupt::~EndOnInterrupt() {
  g_end_on_interrupt = false;
}

CLI::Validator WholeNumberFrom(int64_t least) {
  return CLI::Validator(
      [least](std::string& text) {
        int64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, problem] = std::from_chars(text.data(), end, value);
        if (problem == std::errc() && stop == end && value >= least) return std::string();
        return fmt::format("\"{}\" is not a whole number of {} or more", text, least);
      },
      fmt::format(">= {}", least));
}

CLI::Validator NumberFromTo(double least, double most) {
  return CLI::Validator(
      [least, most](std::string& text) {
        double value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, problem] = std::from_chars(text.data(), end, value);
        if (problem == std::errc() && stop == end && value >= least && value <= most) {
          return std::string();
        }
        return fmt::format("\"{}\" is not a number from {:g} to {:g}", text, least, most);
      },
      fmt::format("{:g} to {:g}", least, most));
}

ProgressPrinter::ProgressPrinter(const CommonFlags& flags)
    : flags_(flags), terminal_(isatty(STDERR_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr) {}

void ProgressPrinter::Update(const ProgressEvent& event) {
  if (flags_.quiet) return;
  const auto now = std::chrono::steady_clock::now();
  if (event.stage != stage_) {
    Finish();
    stage_ = event.stage;
    printed_layer_ = -1;
    stage_start_ = now;
    first_work_ = event.work_done;
  }
  const bool last = event.work_done >= event.work_total;
  const double since_print = std::chrono::duration<double>(now - last_print_).count();
  if (terminal_ ? (since_print < 0.1 && !last)
                : (event.layer == printed_layer_ && since_print < 30 && !last)) {
    return;
  }
  if (!terminal_ && since_print < 2 && !last) return;
  last_print_ = now;
  printed_layer_ = event.layer;
  const double elapsed = std::chrono::duration<double>(now - stage_start_).count();
  const double done = static_cast<double>(event.work_done - first_work_);
  const double rate = elapsed > 0.05 ? done / elapsed : 0;
  const double left = rate > 0 ? static_cast<double>(event.work_total - event.work_done) / rate : 0;
  std::string line = fmt::format("{:<8}", event.stage);
  if (event.num_layers > 0) line += fmt::format(" layer {}/{}", event.layer + 1, event.num_layers);
  line +=
      fmt::format(" {:3.0f} %", 100.0 * static_cast<double>(event.work_done) /
                                    static_cast<double>(std::max<int64_t>(1, event.work_total)));
  if (rate > 0) {
    // Tokens per second through the whole model: work counts tokens x layers.
    const double per_second =
        event.bytes ? rate : rate / static_cast<double>(std::max<int64_t>(1, event.num_layers));
    line += event.bytes ? fmt::format("  {}/s", FormatBytes(static_cast<uint64_t>(per_second)))
                        : fmt::format("  {:.0f} tokens/s", per_second);
    line += fmt::format("  ETA {}", FormatSeconds(left));
  }
  line += fmt::format("  RSS {}", FormatBytes(ResidentBytes()));
  if (!event.note.empty()) line += "  " + event.note;
  if (terminal_) {
    std::fprintf(stderr, "\r\033[K%s", line.c_str());
    line_open_ = true;
    std::fflush(stderr);
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
}

void ProgressPrinter::Finish() {
  if (line_open_) std::fprintf(stderr, "\n");
  line_open_ = false;
}

Session::Session() : start_(std::chrono::steady_clock::now()), progress_(flags) {
  control_.on_progress = [this](const ProgressEvent& event) { progress_.Update(event); };
  control_.on_warning = [this](const std::string& message) { Warn(message); };
  control_.interrupted = &g_interrupted;
}

ThreadPool& Session::pool() {
  if (!pool_) {
    if (!flags.isa.empty()) SelectIsa(flags.isa);
    pool_ = std::make_unique<ThreadPool>(flags.threads);
  }
  return *pool_;
}

uint64_t Session::memory_budget() const {
  return flags.max_memory.empty() ? DefaultMemoryBudget()
                                  : ParseBytes(flags.max_memory, "--max-memory");
}

void Session::RequireMemory(const MemoryPlan& plan, const std::string& verb) {
  if (flags.verbose || flags.dry_run) {
    Note(fmt::format("{} will hold, of {} allowed:\n{}", verb, FormatBytes(memory_budget()),
                     plan.Table()));
  }
  OrderedJson items = OrderedJson::array();
  for (const MemoryItem& item : plan.items()) {
    items.push_back({{"what", item.what}, {"bytes", item.bytes}});
  }
  memory_plans_.push_back({{"step", verb}, {"bytes", plan.total_bytes()}, {"items", items}});
  plan.Require(memory_budget());
}

void Session::PrintDryRun(const std::string& verb, const OrderedJson& work) {
  if (!flags.json) return;  // the notes said it all
  OrderedJson json = {{"schema", "winnow.dry-run/1"},
                      {"verb", verb},
                      {"memory_budget_bytes", memory_budget()},
                      {"memory", memory_plans_}};
  json.update(work);
  PrintJson(json);
}

void Session::Note(const std::string& text) {
  if (flags.quiet) return;
  progress_.Finish();
  std::fprintf(stderr, "%s\n", text.c_str());
}

void Session::Warn(const std::string& text) {
  progress_.Finish();
  std::fprintf(stderr, "warning: %s\n", text.c_str());
}

void Session::Print(const std::string& text) {
  progress_.Finish();
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (text.empty() || text.back() != '\n') std::fputc('\n', stdout);
  std::fflush(stdout);
}

void Session::PrintJson(const OrderedJson& value) {
  // ASCII only: a line separator inside a string must not look like the end of a line to anyone.
  Print(value.dump(-1, ' ', true, OrderedJson::error_handler_t::replace));
}

void Session::PrintUsage() {
  Note(fmt::format("peak memory {}, read {}, {}", FormatBytes(PeakResidentBytes()),
                   FormatBytes(BytesReadByProcess()), FormatSeconds(seconds())));
}

ComputePrecision Session::compute() const {
  return flags.compute == "f32" ? ComputePrecision::kF32 : ComputePrecision::kAuto;
}

double Session::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Session::AddComputeFlags(CLI::App& verb) {
  verb.add_option("-t,--threads", flags.threads, "Threads (default: all CPUs this process may use)")
      ->check(WholeNumberFrom(0))
      ->check(CLI::Range(0, 1024));
  AddMemoryFlag(verb);
  verb.add_option("--compute", flags.compute, "f32, or auto: bf16 activations where that is faster")
      ->check(CLI::IsMember({"f32", "auto"}));
  verb.add_option("--isa", flags.isa,
                  "Pin the kernels to one instruction set (see `winnow doctor`)");
}

void Session::AddMemoryFlag(CLI::App& verb) {
  verb.add_option("--max-memory", flags.max_memory,
                  "Memory budget, e.g. 4G (default: 80 % of what is free)");
}

void Session::AddOutputFlags(CLI::App& verb, bool resumable) {
  verb.add_flag("--force", flags.force, "Replace an existing output");
  verb.add_flag("--dry-run", flags.dry_run, "Say what would be done, held and written; do nothing");
  if (resumable) verb.add_flag("--resume", flags.resume, "Go on with an interrupted run");
}

void Session::AddReportFlags(CLI::App& verb) {
  verb.add_flag("--json", flags.json, "Print the result as one JSON object");
  verb.add_flag("-q,--quiet", flags.quiet, "No progress and notes");
  verb.add_flag("-v,--verbose", flags.verbose, "More notes");
}

std::string OutputPath(std::string path) {
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  if (path.empty()) throw UsageError("-o: the name is empty", "name the output to write");
  return path;
}

namespace {

bool LiesIn(const fs::path& inner, const fs::path& outer) {
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

// Whether --force may remove the folder: it is empty, or one of ours.
bool IsOurs(const fs::path& folder) {
  return fs::is_empty(folder) || fs::exists(folder / "stats.json") ||
         fs::exists(folder / "winnow-plan.json") || fs::exists(folder / "winnow-quantize.json");
}

}  // namespace

void RequireFreshOutput(const std::string& path, OutputKind kind, const CommonFlags& flags,
                        const std::string& model, bool resumable) {
  const bool wants_folder = kind == OutputKind::kFolder;
  if (!model.empty() && wants_folder) {
    const fs::path out = fs::weakly_canonical(path), in = fs::weakly_canonical(model);
    if (LiesIn(out, in) || LiesIn(in, out)) {
      throw UsageError(fmt::format("-o {}: an output cannot share a folder with the model", path),
                       "choose a folder beside the model");
    }
  }
  if (fs::exists(path)) {
    if (fs::is_directory(path) != wants_folder) {
      throw UsageError(fmt::format("{} exists and is a {}", path, wants_folder ? "file" : "folder"),
                       "choose another name with -o");
    }
    if (flags.resume && !flags.force && !fs::exists(path + ".partial")) {
      throw UsageError(fmt::format("{} is complete: there is nothing to resume", path),
                       "use it, or make it anew with --force");
    }
    if (!flags.force) {
      throw UsageError(fmt::format("{} exists already", path),
                       "choose another name with -o, or replace it with --force");
    }
    if (wants_folder && !IsOurs(path)) {
      throw UsageError(
          fmt::format("{} was not written by winnow, so --force leaves it alone", path),
          "choose another name with -o, or remove it yourself");
    }
  }
  const fs::path parent = fs::absolute(path).parent_path();
  if (!fs::is_directory(parent)) {
    throw UsageError(fmt::format("the folder {} does not exist", parent.string()),
                     "create it first");
  }
  if (!flags.resume && !flags.force && fs::exists(path + ".partial")) {
    throw UsageError(fmt::format("{}.partial is left from an interrupted run", path),
                     resumable ? "go on with --resume, or start again with --force"
                               : "start again with --force");
  }
}

void ClaimWorkFolder(const fs::path& folder, const CommonFlags& flags,
                     const std::function<bool(const std::string& name)>& is_ours) {
  if (!fs::exists(folder)) return;
  bool ours = fs::is_directory(folder);
  if (ours) {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      ours = ours && is_ours(entry.path().filename().string());
    }
  }
  if (!ours) {
    throw UsageError(
        fmt::format("{} was not written by winnow, so it is left alone", folder.string()),
        "choose another name with -o, or remove it yourself");
  }
  if (flags.resume || flags.force) return;
  throw UsageError(fmt::format("{} is left from an interrupted run", folder.string()),
                   "go on with --resume, or start again with --force");
}

bool IsNumbered(std::string name, const std::string& prefix) {
  constexpr std::string_view kPartial = ".partial";
  if (name.ends_with(kPartial)) name.resize(name.size() - kPartial.size());
  return name.size() > prefix.size() && name.starts_with(prefix) &&
         name.find_first_not_of("0123456789", prefix.size()) == std::string::npos;
}

std::string Suggest(const std::string& wrong, const std::vector<std::string>& known) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, wrong.size() / 3) + 1;
  for (const std::string& candidate : known) {
    std::vector<size_t> row(candidate.size() + 1);  // edit distance, one row at a time
    for (size_t j = 0; j <= candidate.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= wrong.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i;
      for (size_t j = 1; j <= candidate.size(); ++j) {
        const size_t change = diagonal + (wrong[i - 1] == candidate[j - 1] ? 0 : 1);
        diagonal = row[j];
        row[j] = std::min({row[j] + 1, row[j - 1] + 1, change});
      }
    }
    if (row.back() < best_distance) {
      best_distance = row.back();
      best = candidate;
    }
  }
  return best;
}

}  // namespace winnow::cli
