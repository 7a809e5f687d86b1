// What `eval tasks` shows: tables, the JSON object, and a line for each item.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"          // OrderedJson
#include "eval/task_metrics.h"  // TaskResult

namespace winnow::cli {

// Results of one or two models on the same tasks, in the same order.
struct TaskReport {
  std::vector<TaskResult> tasks;
  std::vector<TaskResult> original = {};  // with --against
  std::string protocol;                   // "as lm-evaluation-harness ..., no BOS, ..."
};

std::string TaskTables(const TaskReport& report);
// `tasks` and `mean_of_tasks`.
OrderedJson TasksJson(const TaskReport& report);
// A JSON object a line for each item, in the order they were read.
std::string ItemLines(std::span<const TaskItem> items, const TaskReport& report,
                      const TaskScores& scores, const TaskScores* original_scores);

}  // namespace winnow::cli
