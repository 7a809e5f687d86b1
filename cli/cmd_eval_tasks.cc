// winnow eval tasks: multiple choice and targets by log-likelihood.
#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "eval/tasks.h"
#include "evaluation.h"
#include "pruning.h"
#include "session.h"
#include "task_report.h"

namespace winnow::cli {
namespace {

struct TaskFlags {
  std::string model, against, plan, items;
  std::vector<std::string> files;
  int64_t limit = 0, max_length = 0;
  bool bos = false, no_skip = false;
};

std::vector<TaskItem> ReadItems(const TaskFlags& flags) {
  const EndOnInterrupt reading;
  std::vector<TaskItem> items;
  for (size_t i = 0; i < flags.files.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (flags.files[i] == flags.files[j]) {
        throw UsageError(fmt::format("{} is given twice", flags.files[i]), "name each file once");
      }
    }
    std::vector<TaskItem> of_file = ReadTaskItems(flags.files[i], flags.limit);
    std::move(of_file.begin(), of_file.end(), std::back_inserter(items));
  }
  return items;
}

TaskRequests Encode(const TaskFlags& flags, std::span<const TaskItem> items, int64_t max_length) {
  const EndOnInterrupt encoding;
  const Tokenizer tokenizer = Tokenizer::Load(flags.model);
  if (flags.bos && !tokenizer.adds_bos()) {
    throw UsageError(fmt::format("--bos: the tokenizer of {} adds no BOS", flags.model),
                     "leave --bos out: its numbers are those without");
  }
  return EncodeRequests(items, tokenizer,
                        {.prefix = tokenizer.bos_id() ? tokenizer.bos_id() : tokenizer.eos_id(),
                         .special_tokens = flags.bos,
                         .max_tokens = max_length > 0 ? max_length - 1 : 0});
}

// The smaller context of the models, 0 if neither says.
int64_t ContextOf(const Model& model, const std::optional<Model>& original) {
  int64_t context = model.config().max_position_embeddings;
  if (original && original->config().max_position_embeddings > 0) {
    const int64_t other = original->config().max_position_embeddings;
    context = context > 0 ? std::min(context, other) : other;
  }
  return context;
}

int64_t MaxLength(Session& session, const TaskFlags& flags, int64_t context) {
  if (flags.max_length == 0) return context;
  if (context > 0 && flags.max_length > context) {
    session.Warn(fmt::format("--max-length {} exceeds the model's context of {}", flags.max_length,
                             context));
  }
  return flags.max_length;
}

// Nothing with --dry-run.
TaskScores Score(Session& session, const Model& model, std::span<const TaskItem> items,
                 const TaskRequests& requests, const EvalRun& run) {
  EvalOptions options;
  options.memory_budget_bytes = session.memory_budget();
  options.spill_folder = fs::temp_directory_path();
  options.kept_experts = run.kept_experts;
  options.skip_betas = run.skip_betas;
  options.compute = session.compute();
  const EvalPlan plan = PlanTasks(model, items, requests, options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "eval");
  if (session.flags.dry_run) return {};
  return RunTasks(model, items, requests, options, plan, session.pool(), session.control());
}

std::optional<Model> OpenOriginal(const TaskFlags& flags, const Model& model) {
  if (flags.against.empty()) return std::nullopt;
  Model original = Model::Open(flags.against);
  if (original.config().vocab_size != model.config().vocab_size) {
    throw UsageError("--against: the two models have different vocabularies",
                     "evaluate models of different tokenizers one at a time");
  }
  return original;
}

void WarnOfTruncation(Session& session, const TaskRequests& requests, int64_t max_length) {
  if (requests.truncated == 0) return;
  session.Warn(fmt::format("{} of {} requests are longer than {} tokens and were cut from the left",
                           requests.truncated, requests.target_offsets.size() - 1, max_length - 1));
}

void Report(Session& session, const Model& model, const TaskReport& report,
            const TaskRequests& requests, const TaskFlags& flags, int64_t max_length,
            const std::optional<SkipCounts>& skipping) {
  if (session.flags.json) {
    OrderedJson json = {{"schema", "winnow.eval-tasks/1"},
                        {"protocol", "lm-eval"},
                        {"bos", flags.bos},
                        {"max_length", max_length},
                        {"requests", requests.target_offsets.size() - 1},
                        {"truncated", requests.truncated},
                        {"tokens", requests.inputs.num_tokens()}};
    json.update(TasksJson(report));
    if (skipping) json.update(SkippingJson(model, *skipping));
    json["peak_rss_bytes"] = PeakResidentBytes();
    session.PrintJson(json);
    return;
  }
  session.Print(TaskTables(report));
  if (skipping) session.Print(DescribeSkipping(model, *skipping));
  session.PrintUsage();
}

int RunEvalTasks(Session& session, TaskFlags& flags) {
  if (!flags.items.empty()) {
    flags.items = OutputPath(flags.items);
    RequireFreshOutput(flags.items, OutputKind::kFile, session.flags);
  }
  const Model model = Model::Open(flags.model);
  const std::optional<Model> original = OpenOriginal(flags, model);
  const std::vector<TaskItem> items = ReadItems(flags);
  const int64_t max_length = MaxLength(session, flags, ContextOf(model, original));
  const TaskRequests requests = Encode(flags, items, max_length);
  WarnOfTruncation(session, requests, max_length);
  TaskScores original_scores;
  if (original) {
    original_scores = Score(session, *original, items, requests,
                            {.skip_betas = SkippingOf(*original, "", flags.no_skip)});
  }
  const TaskScores scores = Score(session, model, items, requests,
                                  {.kept_experts = WhatIf(session, model, flags.plan),
                                   .skip_betas = SkippingOf(model, flags.plan, flags.no_skip)});
  if (session.flags.dry_run) {
    session.PrintDryRun("eval tasks", {{"items", items.size()},
                                       {"requests", requests.target_offsets.size() - 1},
                                       {"tokens", requests.inputs.num_tokens()}});
    return 0;
  }
  TaskReport report{.tasks = SummarizeTasks(items, scores),
                    .protocol = fmt::format("counted as lm-evaluation-harness does ({}, "
                                            "max_length {})",
                                            flags.bos ? "with BOS" : "no BOS",
                                            max_length > 0 ? std::to_string(max_length) : "any")};
  if (original) report.original = SummarizeTasks(items, original_scores);
  if (!flags.items.empty()) {
    WriteFileAtomically(flags.items,
                        ItemLines(items, report, scores, original ? &original_scores : nullptr));
  }
  Report(session, model, report, requests, flags, max_length, scores.skipping);
  return 0;
}

}  // namespace

void AddEvalTasks(CLI::App& eval, Session& session) {
  auto flags = std::make_shared<TaskFlags>();
  CLI::App* tasks = eval.add_subcommand("tasks", "Multiple choice and targets by log-likelihood");
  tasks->set_help_flag("-h,--help", "Help");
  tasks->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  tasks
      ->add_option("FILE", flags->files,
                   "Items, one a line: .jsonl with query, choices, gold; also .xz .zst .gz")
      ->required();
  tasks->add_option("--against", flags->against,
                    "Original model: adds differences on the same items");
  tasks->add_option("--limit", flags->limit, "The first N items of each file")
      ->check(WholeNumberFrom(1));
  tasks->add_option("--items", flags->items,
                    "Write each item's log-likelihoods and answers to this .jsonl");
  tasks->add_flag("--bos", flags->bos, "Start each request with BOS (lm-eval: add_bos_token=True)");
  tasks
      ->add_option("--max-length", flags->max_length,
                   "As lm-eval's max_length: a request has one token less (default: the context)")
      ->check(WholeNumberFrom(3));
  tasks->add_option("--plan", flags->plan, "Behave as if this plan were applied");
  tasks->add_flag("--no-skip", flags->no_skip, "Run every expert, whatever config.json says");
  session.AddComputeFlags(*tasks);
  session.AddOutputFlags(*tasks, false);
  session.AddReportFlags(*tasks);
  tasks->footer(
      "Example: winnow eval tasks SMALLER arc_easy.jsonl hellaswag.jsonl --against MODEL");
  tasks->callback([&session, flags] {
    session.action = [&session, flags] { return RunEvalTasks(session, *flags); };
  });
}

}  // namespace winnow::cli
