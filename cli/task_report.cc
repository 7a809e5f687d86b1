#include "task_report.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/units.h"

namespace winnow::cli {
namespace {

bool IsChoiceTask(const TaskResult& task) {
  return !task.target.has_value();
}

std::string Show(const Estimate& estimate) {
  return fmt::format(
      "{:.4f} +- {}", estimate.value,
      estimate.standard_error ? fmt::format("{:.4f}", *estimate.standard_error) : "-     ");
}

std::string ShowChange(const Estimate& estimate) {
  return (estimate.value < 0 ? "" : "+") + Show(estimate);
}

OrderedJson OptionalNumber(const std::optional<double>& value) {
  return value ? OrderedJson(*value) : OrderedJson();
}

OrderedJson EstimateJson(const Estimate& estimate) {
  return {{"value", estimate.value}, {"standard_error", OptionalNumber(estimate.standard_error)}};
}

// Over tasks with choices, each counting alike; targets have no accuracy to compare with.
struct MeanOfTasks {
  size_t tasks = 0;
  int64_t items = 0;
  std::vector<std::string> names;
  std::vector<Estimate> accuracies, original, differences;
};

MeanOfTasks Mean(const TaskReport& report) {
  MeanOfTasks mean;
  std::vector<std::vector<Estimate>> values(3), originals(3), differences(3);
  for (size_t t = 0; t < report.tasks.size(); ++t) {
    const TaskResult& task = report.tasks[t];
    if (!IsChoiceTask(task)) continue;
    ++mean.tasks;
    mean.items += static_cast<int64_t>(task.items.size());
    for (size_t a = 0; a < task.accuracies.size(); ++a) {
      values[a].push_back(task.accuracies[a].mean);
      if (report.original.empty()) continue;
      const Accuracy& before = report.original[t].accuracies[a];
      originals[a].push_back(before.mean);
      differences[a].push_back(CompareAccuracy(before, task.accuracies[a]).difference);
    }
    if (mean.tasks == 1) {
      for (const Accuracy& accuracy : task.accuracies) mean.names.push_back(accuracy.name);
    }
  }
  for (size_t a = 0; a < mean.names.size(); ++a) {
    mean.accuracies.push_back(MeanOf(values[a]));
    if (report.original.empty()) continue;
    mean.original.push_back(MeanOf(originals[a]));
    mean.differences.push_back(MeanOf(differences[a]));
  }
  return mean;
}

std::string Count(size_t items) {
  return FormatCount(static_cast<uint64_t>(items));
}

std::string ChoiceTable(const TaskReport& report, const MeanOfTasks& mean, size_t width) {
  if (mean.tasks == 0) return "";
  std::string text = fmt::format("  {:<{}} {:>7}", "choices", width, "items");
  for (const std::string& name : mean.names) text += fmt::format("  {:>16}", name);
  text += "\n";
  const auto row = [&](const std::string& name, size_t items,
                       const std::vector<Estimate>& accuracies) {
    text += fmt::format("  {:<{}} {:>7}", name, width, Count(items));
    for (const Estimate& accuracy : accuracies) text += "  " + Show(accuracy);
    text += "\n";
  };
  for (const TaskResult& task : report.tasks) {
    if (!IsChoiceTask(task)) continue;
    std::vector<Estimate> accuracies;
    for (const Accuracy& accuracy : task.accuracies) accuracies.push_back(accuracy.mean);
    row(task.name, task.items.size(), accuracies);
  }
  if (mean.tasks > 1) row("mean of tasks", static_cast<size_t>(mean.items), mean.accuracies);
  return text;
}

std::string TargetTable(const TaskReport& report, size_t width) {
  std::string text;
  for (const TaskResult& task : report.tasks) {
    if (IsChoiceTask(task)) continue;
    if (text.empty()) {
      text = fmt::format("  {:<{}} {:>7}  {:>16}  {:>12} {:>11} {:>10} {:>9}\n", "targets", width,
                         "items", "greedy", "ppl (target)", "ppl (token)", "+- (nll)", "bits/byte");
    }
    const PerplexityResult& target = *task.target;
    text +=
        fmt::format("  {:<{}} {:>7}  {}  {:>12} {:>11.4f} {:>10} {:>9.4f}\n", task.name, width,
                    Count(task.items.size()), Show(task.accuracies.front().mean),
                    task.target_perplexity ? fmt::format("{:.6g}", *task.target_perplexity) : "-",
                    target.perplexity,
                    target.standard_error ? fmt::format("{:.4f}", *target.standard_error) : "-",
                    target.bits_per_byte.value_or(0));
  }
  return text;
}

std::string ChangeTable(const TaskReport& report, const MeanOfTasks& mean, size_t width) {
  if (report.original.empty()) return "";
  std::string text =
      fmt::format("  {:<{}} {:<9} {:>8}  {:>17} {:>8} {:>7} {:>5} {:>8}\n", "against the original",
                  width, "", "original", "d +- s.e.", "changed", "gained", "lost", "p");
  for (size_t t = 0; t < report.tasks.size(); ++t) {
    const TaskResult& task = report.tasks[t];
    const TaskResult& original = report.original[t];
    for (size_t a = 0; a < task.accuracies.size(); ++a) {
      const Accuracy& before = original.accuracies[a];
      const AccuracyChange change = CompareAccuracy(before, task.accuracies[a]);
      text += fmt::format("  {:<{}} {:<9} {:>8.4f}  {:>17} {:>8} {:>7} {:>5} {:>8.2g}\n", task.name,
                          width, before.name, before.mean.value, ShowChange(change.difference),
                          change.changed, change.gained, change.lost, change.p_value);
    }
    if (task.target) {
      const PairedDifference difference = Compare(*original.target, *task.target);
      text += fmt::format("  {:<{}} {:<9} {:>8.4f}  {:>17}\n", task.name, width, "nll/token",
                          original.target->nll,
                          ShowChange({difference.nll, difference.standard_error}));
    }
  }
  if (mean.tasks > 1) {
    for (size_t a = 0; a < mean.names.size(); ++a) {
      text += fmt::format("  {:<{}} {:<9} {:>8.4f}  {:>17}\n", "mean of tasks", width,
                          mean.names[a], mean.original[a].value, ShowChange(mean.differences[a]));
    }
  }
  return text;
}

OrderedJson AccuracyJson(const Accuracy& accuracy, const Accuracy* original) {
  OrderedJson json = EstimateJson(accuracy.mean);
  if (original == nullptr) return json;
  const AccuracyChange change = CompareAccuracy(*original, accuracy);
  json["original"] = EstimateJson(original->mean);
  json["difference"] = EstimateJson(change.difference);
  json["changed"] = change.changed;
  json["gained"] = change.gained;
  json["lost"] = change.lost;
  json["p_value"] = change.p_value;
  return json;
}

OrderedJson TargetJson(const TaskResult& task) {
  return {{"perplexity", OptionalNumber(task.target_perplexity)},
          {"token_nll", task.target->nll},
          {"token_perplexity", task.target->perplexity},
          {"standard_error", OptionalNumber(task.target->standard_error)},
          {"tokens", task.target->tokens},
          {"bits_per_byte", OptionalNumber(task.target->bits_per_byte)}};
}

void AddScores(OrderedJson& line, const std::vector<RequestScore>& scores) {
  OrderedJson sums = OrderedJson::array(), greedy = OrderedJson::array();
  for (const RequestScore& score : scores) {
    sums.push_back(score.log_likelihood);
    greedy.push_back(score.is_greedy);
  }
  line["log_likelihoods"] = sums;
  line["is_greedy"] = greedy;
}

// Answers of all items: what each metric chose.
void AddAnswers(std::vector<OrderedJson>& lines, const std::vector<TaskResult>& tasks,
                const char* inside) {
  for (const TaskResult& task : tasks) {
    if (!IsChoiceTask(task)) continue;
    for (size_t i = 0; i < task.items.size(); ++i) {
      OrderedJson answers;
      for (const Accuracy& accuracy : task.accuracies) answers[accuracy.name] = accuracy.answers[i];
      OrderedJson& line = lines[task.items[i]];
      (inside == nullptr ? line : line[inside])["answers"] = answers;
    }
  }
}

}  // namespace

std::string TaskTables(const TaskReport& report) {
  size_t width = 20;
  for (const TaskResult& task : report.tasks) width = std::max(width, task.name.size());
  const MeanOfTasks mean = Mean(report);
  return fmt::format("log-likelihood of answers, {}\n", report.protocol) +
         ChoiceTable(report, mean, width) + TargetTable(report, width) +
         ChangeTable(report, mean, width);
}

OrderedJson TasksJson(const TaskReport& report) {
  OrderedJson tasks = OrderedJson::array();
  for (size_t t = 0; t < report.tasks.size(); ++t) {
    const TaskResult& task = report.tasks[t];
    const TaskResult* original = report.original.empty() ? nullptr : &report.original[t];
    OrderedJson json = {{"name", task.name}, {"items", task.items.size()}};
    for (size_t a = 0; a < task.accuracies.size(); ++a) {
      json[task.accuracies[a].name] = AccuracyJson(
          task.accuracies[a], original == nullptr ? nullptr : &original->accuracies[a]);
    }
    if (task.target) {
      json["target"] = TargetJson(task);
      if (original != nullptr) {
        const PairedDifference difference = Compare(*original->target, *task.target);
        json["target"]["original"] = TargetJson(*original);
        json["target"]["token_nll_difference"] =
            EstimateJson({difference.nll, difference.standard_error});
      }
    }
    tasks.push_back(json);
  }
  const MeanOfTasks mean = Mean(report);
  OrderedJson means = OrderedJson::object();
  for (size_t a = 0; a < mean.names.size(); ++a) {
    OrderedJson json = EstimateJson(mean.accuracies[a]);
    if (!report.original.empty()) {
      json["original"] = EstimateJson(mean.original[a]);
      json["difference"] = EstimateJson(mean.differences[a]);
    }
    means[mean.names[a]] = json;
  }
  return {{"tasks", tasks}, {"mean_of_tasks", means}};
}

std::string ItemLines(std::span<const TaskItem> items, const TaskReport& report,
                      const TaskScores& scores, const TaskScores* original_scores) {
  std::vector<OrderedJson> lines;
  for (size_t i = 0; i < items.size(); ++i) {
    OrderedJson& line = lines.emplace_back();
    line = {{"item", i}, {"where", items[i].where}, {"task", items[i].task}};
    if (items[i].is_choice()) line["gold"] = items[i].gold;
    OrderedJson tokens = OrderedJson::array();
    for (const RequestScore& score : scores.items[i]) tokens.push_back(score.tokens);
    line["tokens"] = tokens;
    AddScores(line, scores.items[i]);
    if (original_scores != nullptr) AddScores(line["original"], original_scores->items[i]);
  }
  AddAnswers(lines, report.tasks, nullptr);
  AddAnswers(lines, report.original, "original");
  std::string text;
  for (const OrderedJson& line : lines) {
    text += line.dump(-1, ' ', true, OrderedJson::error_handler_t::replace) + "\n";
  }
  return text;
}

}  // namespace winnow::cli
