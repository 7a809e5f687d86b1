#include "eval/task_metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace winnow {
namespace {

// The choice of the highest log-likelihood, each divided by its entry in `lengths` if there are
// any.
int32_t BestChoice(std::span<const RequestScore> scores, std::span<const int64_t> lengths) {
  const auto value = [&](size_t i) {
    const double sum = scores[i].log_likelihood;
    return lengths.empty() ? sum : sum / static_cast<double>(lengths[i]);
  };
  size_t best = 0;
  for (size_t i = 1; i < scores.size(); ++i) {
    if (value(i) > value(best)) best = i;
  }
  return static_cast<int32_t>(best);
}

void Add(Accuracy& accuracy, int32_t answer, int32_t right) {
  accuracy.answers.push_back(answer);
  accuracy.correct.push_back(answer == right ? 1 : 0);
}

void SummarizeChoices(std::span<const TaskItem> items, const TaskScores& scores,
                      TaskResult& result) {
  Accuracy sum{.name = "acc"}, norm{.name = "acc_norm"}, bytes{.name = "acc_bytes"};
  for (const size_t i : result.items) {
    const TaskItem& item = items[i];
    Add(sum, BestChoice(scores.items[i], {}), item.gold);
    Add(norm, BestChoice(scores.items[i], item.characters), item.gold);
    Add(bytes, BestChoice(scores.items[i], item.bytes), item.gold);
  }
  result.accuracies = {std::move(sum), std::move(norm), std::move(bytes)};
}

void SummarizeTargets(std::span<const TaskItem> items, const TaskScores& scores,
                      TaskResult& result) {
  Accuracy greedy{.name = "acc"};
  std::vector<double> nll;
  std::vector<int64_t> tokens;
  uint64_t bytes = 0;
  double total = 0;
  for (const size_t i : result.items) {
    const RequestScore& score = scores.items[i].front();
    Add(greedy, score.is_greedy ? 1 : 0, 1);
    nll.push_back(-score.log_likelihood);
    total -= score.log_likelihood;
    tokens.push_back(score.tokens);
    bytes += static_cast<uint64_t>(items[i].bytes.front());
  }
  result.accuracies = {std::move(greedy)};
  result.target = Summarize(nll, tokens, bytes);
  // Long texts are less likely than a double can say.
  const double whole = std::exp(total / static_cast<double>(nll.size()));
  if (std::isfinite(whole)) result.target_perplexity = whole;
}

}  // namespace

Estimate MeanOf(std::span<const double> values) {
  const auto n = static_cast<double>(values.size());
  Estimate mean;
  for (const double value : values) mean.value += value / n;
  if (values.size() < 2) return mean;
  double squares = 0;
  for (const double value : values) squares += (value - mean.value) * (value - mean.value);
  mean.standard_error = std::sqrt(squares / (n - 1) / n);
  return mean;
}

Estimate MeanOf(std::span<const Estimate> tasks) {
  const auto n = static_cast<double>(tasks.size());
  Estimate mean;
  double variance = 0;
  bool known = true;
  for (const Estimate& task : tasks) {
    mean.value += task.value / n;
    known = known && task.standard_error.has_value();
    const double error = task.standard_error.value_or(0) / n;
    variance += error * error;
  }
  if (known) mean.standard_error = std::sqrt(variance);
  return mean;
}

std::vector<TaskResult> SummarizeTasks(std::span<const TaskItem> items, const TaskScores& scores) {
  std::vector<TaskResult> results;
  for (size_t i = 0; i < items.size(); ++i) {
    auto found = std::ranges::find(results, items[i].task, &TaskResult::name);
    if (found == results.end()) {
      results.push_back({.name = items[i].task});
      found = results.end() - 1;
    } else if (items[found->items.front()].is_choice() != items[i].is_choice()) {
      throw UsageError(fmt::format("{}: task {} has items with choices and items with a target",
                                   items[i].where, items[i].task),
                       "give them different names: key \"task\"");
    }
    found->items.push_back(i);
  }
  for (TaskResult& result : results) {
    const bool choices = items[result.items.front()].is_choice();
    if (choices) {
      SummarizeChoices(items, scores, result);
    } else {
      SummarizeTargets(items, scores, result);
    }
    for (Accuracy& accuracy : result.accuracies) accuracy.mean = MeanOf(accuracy.correct);
  }
  return results;
}

AccuracyChange CompareAccuracy(const Accuracy& before, const Accuracy& after) {
  AccuracyChange change;
  std::vector<double> differences;
  for (size_t i = 0; i < before.correct.size(); ++i) {
    const double difference = after.correct[i] - before.correct[i];
    differences.push_back(difference);
    if (after.answers[i] != before.answers[i]) ++change.changed;
    if (difference > 0) ++change.gained;
    if (difference < 0) ++change.lost;
  }
  change.difference = MeanOf(differences);
  change.p_value = McNemarPValue(change.gained, change.lost);
  return change;
}

double McNemarPValue(int64_t gained, int64_t lost) {
  const int64_t n = gained + lost, fewer = std::min(gained, lost);
  // Twice the probability of `fewer` or less, by logarithms of binomial coefficients.
  double log_ways = 0, sum = 0;
  for (int64_t k = 0; k <= fewer; ++k) {
    if (k > 0) log_ways += std::log(static_cast<double>(n - k + 1) / static_cast<double>(k));
    sum += std::exp(log_ways - static_cast<double>(n) * std::log(2.0));
  }
  return std::min(1.0, 2 * sum);
}

}  // namespace winnow
