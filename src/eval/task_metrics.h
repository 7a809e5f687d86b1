// From log-likelihoods of task items to figures of tasks, and to differences of two models on the
// same items. Definitions are those of lm-evaluation-harness: `acc` takes the choice of the highest
// log-likelihood, `acc_norm` divides it by the choice's characters, `acc_bytes` by its UTF-8 bytes;
// of equals the first. An error of a mean is sqrt(sum (x - mean)^2 / (n - 1) / n).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "eval/perplexity.h"  // PerplexityResult
#include "eval/task_items.h"  // TaskItem
#include "eval/tasks.h"       // RequestScore

namespace winnow {

struct Estimate {
  double value = 0;
  std::optional<double> standard_error;  // nothing for a single item
};
Estimate MeanOf(std::span<const double> values);
// Of means over tasks, each counting alike.
Estimate MeanOf(std::span<const Estimate> tasks);

struct Accuracy {
  std::string name;  // acc, acc_norm, acc_bytes
  // Of each item of the task; of a target 1 if it is greedy, else 0.
  std::vector<int32_t> answers = {};
  std::vector<double> correct = {};  // 0 or 1
  Estimate mean = {};
};

struct TaskResult {
  std::string name;
  std::vector<size_t> items = {};         // their numbers in the list they were read into
  std::vector<Accuracy> accuracies = {};  // of choices all three; of targets acc: all is greedy
  // Of targets: per token. Their perplexity as wholes, exp of the mean of -log-likelihood, is what
  // lm-evaluation-harness prints for LAMBADA.
  std::optional<PerplexityResult> target = {};
  std::optional<double> target_perplexity = {};
};

// A task for each name, in order of appearance. UsageError if one has both choices and targets.
std::vector<TaskResult> SummarizeTasks(std::span<const TaskItem> items, const TaskScores& scores);

// A second result of the same items against the first.
struct AccuracyChange {
  Estimate difference;  // mean of the items' differences, with its paired error
  int64_t changed = 0;  // items answered otherwise
  int64_t gained = 0;   // wrong before, right now
  int64_t lost = 0;     // right before, wrong now
  double p_value = 1;   // of gained and lost being equally likely (McNemar's test, exact)
};
AccuracyChange CompareAccuracy(const Accuracy& before, const Accuracy& after);

// Probability of a split of n fair coins at least as uneven as `gained` to `lost`.
double McNemarPValue(int64_t gained, int64_t lost);

}  // namespace winnow
