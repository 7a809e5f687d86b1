// Task items: what is refused, requests against those of the published harness, log-likelihoods
// against softmax of whole logits, figures against numbers worked out by hand.
#include "eval/tasks.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/json.h"
#include "eval/task_metrics.h"
#include "forward/test_support.h"
#include "text/json_lines.h"

namespace winnow {
namespace {

constexpr uint64_t kAmpleBytes = uint64_t{1} << 40;
// Sums of exponentials in f32 lanes against double, over some tokens.
constexpr double kLikelihoodLimit = 1e-5;
const fs::path kSource = WINNOW_SOURCE_DIR;
const fs::path kItems = fs::path(WINNOW_TEST_DATA) / "eval" / "task-items.jsonl";

class TaskFiles : public testing::Test {
 protected:
  std::vector<TaskItem> Read(const std::string& content, int64_t limit = 0) const {
    return ReadTaskItems(folder_.Write("items.jsonl", content), limit);
  }
  // The message, which names the line.
  std::string Refusal(const std::string& line) const {
    const std::string good = R"({"task": "t", "query": "Q", "choices": ["a", "b"], "gold": 1})"
                             "\n";
    try {
      Read(good + line + "\n" + good);
    } catch (const ModelError& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("items.jsonl: line 2: "), std::string::npos) << message;
      EXPECT_NE(error.hint(), "") << message;
      return message.substr(message.find("line 2: ") + 8);
    }
    ADD_FAILURE() << "accepted: " << line;
    return "";
  }
  const TestFolder folder_;
};

TEST_F(TaskFiles, FormsOfItems) {
  const std::vector<TaskItem> items =
      Read(R"({"task": "t", "query": "Q", "choices": ["a", "ßé"], "gold": 1, "subject": "x"})"
           "\n\n"
           R"({"task": "t", "query": "Q", "choices": ["a", "b", "c"], "gold": 0, "sep": "\n"})"
           "\n"
           R"({"task": "w", "query": "Q", "choices": ["a c", "b c"], "gold": 0, )"
           R"("context_options": ["Q a", "Q b"], "continuation": "c"})"
           "\n"
           R"({"task": "l", "context": "C", "target": "word", "text": "C word"})"
           "\n"
           R"({"task": "g", "query": "Q", "choices": [], "gold": -1, "target": "12"})");
  ASSERT_EQ(items.size(), 5u);
  EXPECT_EQ(items[0].requests[1].context, "Q");
  EXPECT_EQ(items[0].requests[1].continuation, " ßé");
  EXPECT_EQ(items[0].characters, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(items[0].bytes, (std::vector<int64_t>{1, 4}));
  EXPECT_EQ(items[0].gold, 1);
  EXPECT_EQ(items[1].requests.size(), 3u);
  EXPECT_EQ(items[1].requests[2].continuation, "\nc");
  EXPECT_TRUE(items[1].where.ends_with("items.jsonl: line 3"));
  EXPECT_EQ(items[2].requests[0].context, "Q a");
  EXPECT_EQ(items[2].requests[1].context, "Q b");
  EXPECT_EQ(items[2].requests[1].continuation, " c");
  EXPECT_TRUE(items[2].is_choice());
  EXPECT_EQ(items[3].requests[0].continuation, " word");
  EXPECT_FALSE(items[3].is_choice());
  EXPECT_EQ(items[4].requests[0].context, "Q");
  EXPECT_FALSE(items[4].is_choice());
}

TEST_F(TaskFiles, LimitTakesTheFirst) {
  const std::string line = R"({"task": "t", "query": "Q", "choices": ["a", "b"], "gold": 1})";
  EXPECT_EQ(Read(line + "\n" + line + "\nno JSON", 2).size(), 2u);
  EXPECT_EQ(Read(line + "\n" + line, 3).size(), 2u);
  EXPECT_THROW(Read(line + "\nno JSON"), ModelError);
}

TEST_F(TaskFiles, WhatIsWrongIsNamed) {
  EXPECT_THROW(Read(""), UsageError);
  EXPECT_THROW(Read("\n  \n"), UsageError);
  EXPECT_THROW(ReadTaskItems(folder_.path() / "absent.jsonl", 0), RuntimeError);
  EXPECT_EQ(Refusal("[1]"), "expected an object, got array");
  EXPECT_EQ(Refusal(R"({"query": "Q", "choices": ["a", "b"], "gold": 0})"), "no key \"task\"");
  EXPECT_EQ(Refusal(R"({"task": "", "query": "Q", "choices": ["a", "b"], "gold": 0})"),
            "\"task\" is empty");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "gold": 0})"), "no choices and no target");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": [], "gold": 0})"),
            "no choices and no target");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": ["a"], "gold": 0})"),
            "\"choices\" has 1 entries, expected two or more");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": "ab", "gold": 0})"),
            "\"choices\" is string, expected an array of strings");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": ["a", 2], "gold": 0})"),
            "\"choices[1]\" is number, expected a string");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": ["a", ""], "gold": 0})"),
            "\"choices[1]\" is empty");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": ["a", "b"]})"), "no key \"gold\"");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": ["a", "b"], "gold": "0"})"),
            "\"gold\" is \"0\", expected a whole number");
  for (const std::string gold : {"2", "-1", "18446744073709551615"}) {
    EXPECT_EQ(
        Refusal(R"({"task": "t", "query": "Q", "choices": ["a", "b"], "gold": )" + gold + "}"),
        "\"gold\" is " + gold + ", expected 0 to 1: \"choices\" has 2 entries");
  }
  EXPECT_EQ(Refusal(R"({"task": "t", "choices": ["a", "b"], "gold": 0})"), "no key \"query\"");
  EXPECT_EQ(Refusal(R"({"task": "t", "query": "Q", "choices": ["a", "b"], "gold": 0, "sep": 1})"),
            "\"sep\" is number, expected a string");
  EXPECT_EQ(Refusal(R"({"task": "t", "context_options": ["a", "b"], "gold": 0})"),
            "no key \"continuation\"");
  EXPECT_EQ(Refusal(R"({"task": "t", "context": "C", "target": ""})"), "\"target\" is empty");
  EXPECT_EQ(Refusal(R"({"task": "t", "target": "x"})"), "no key \"query\"");
}

// A request as the harness would send it: ids, and how many of them are context.
struct SentRequest {
  std::vector<int32_t> ids;
  int64_t context = 0;
  bool operator==(const SentRequest&) const = default;
};

SentRequest RequestOf(const TaskRequests& requests, size_t r) {
  const std::span<const TokenTarget> targets =
      std::span(requests.targets)
          .subspan(requests.target_offsets[r],
                   requests.target_offsets[r + 1] - requests.target_offsets[r]);
  const std::vector<int64_t>& offsets = requests.inputs.offsets;
  const auto end = std::upper_bound(offsets.begin(), offsets.end(), targets.front().position);
  SentRequest sent;
  sent.ids.assign(requests.inputs.ids.begin() + *(end - 1), requests.inputs.ids.begin() + *end);
  sent.context = targets.front().position - *(end - 1) + 1;
  // What was fed is what is predicted, one token later.
  for (size_t t = 0; t + 1 < targets.size(); ++t) {
    EXPECT_EQ(requests.inputs.ids[static_cast<size_t>(targets[t].position) + 1], targets[t].id);
  }
  EXPECT_EQ(targets.back().position, *end - 1);
  sent.ids.push_back(targets.back().id);
  return sent;
}

TEST(TaskRequests, AreThoseOfThePublishedHarness) {
  const std::vector<TaskItem> items = ReadTaskItems(kItems, 0);
  int settings = 0;
  ReadJsonObjects(fs::path(WINNOW_TEST_DATA) / "eval" / "lm-eval-requests.jsonl",
                  [&](const std::string& where, const Json& golden, std::string_view) {
                    ++settings;
                    SCOPED_TRACE(where + ": " + golden["tokenizer"].get<std::string>());
                    const Tokenizer tokenizer =
                        Tokenizer::Load(kSource / golden["tokenizer"].get<std::string>());
                    const std::optional<int32_t> prefix =
                        tokenizer.bos_id() ? tokenizer.bos_id() : tokenizer.eos_id();
                    EXPECT_EQ(prefix, golden["prefix"].get<int32_t>());
                    const TaskRequests requests =
                        EncodeRequests(items, tokenizer,
                                       {.prefix = prefix,
                                        .special_tokens = golden["add_bos_token"].get<bool>(),
                                        .max_tokens = golden["max_length"].get<int64_t>() - 1});
                    const Json& expected = golden["requests"];
                    if (requests.target_offsets.size() != expected.size() + 1) {
                      ADD_FAILURE() << requests.target_offsets.size() - 1;
                      return true;
                    }
                    for (size_t r = 0; r < expected.size(); ++r) {
                      const SentRequest sent = RequestOf(requests, r);
                      EXPECT_EQ(sent.ids, expected[r]["ids"].get<std::vector<int32_t>>()) << r;
                      EXPECT_EQ(sent.context, expected[r]["context"].get<int64_t>()) << r;
                    }
                    EXPECT_EQ(requests.request_offsets.back(), expected.size());
                    EXPECT_EQ(requests.truncated, 2);  // both choices of the long item
                    return true;
                  });
  EXPECT_EQ(settings, 11);
}

class SampleTasks : public testing::Test {
 protected:
  std::vector<TaskItem> Items(const std::string& content) const {
    return ReadTaskItems(folder_.Write("items.jsonl", content), 0);
  }
  TaskRequests Encode(const std::vector<TaskItem>& items, int64_t max_tokens = 0) const {
    return EncodeRequests(items, tokenizer_, {.prefix = 1, .max_tokens = max_tokens});
  }
  TaskScores Score(const std::vector<TaskItem>& items, const TaskRequests& requests,
                   int threads = 1, EvalOptions options = {}, bool spill = false) const {
    options.memory_budget_bytes = kAmpleBytes;
    ThreadPool pool(threads);
    EvalPlan plan = PlanTasks(model_, items, requests, options, threads);
    plan.spill = spill;
    return RunTasks(model_, items, requests, options, plan, pool, {});
  }
  const TestFolder folder_;
  const Model model_ = Model::Open(kSource / "examples" / "sample-mixtral");
  const Tokenizer tokenizer_ = Tokenizer::Load(kSource / "examples" / "sample-mixtral");
};

// Each request alone through the model: log-softmax of its whole logits, in double.
RequestScore ScoreAlone(const Model& model, const SentRequest& request) {
  TokenSet tokens;
  tokens.Append(std::span(request.ids).first(request.ids.size() - 1));
  const std::vector<float> logits = RunForward(model, tokens).logits;
  const auto vocabulary = static_cast<size_t>(model.config().vocab_size);
  RequestScore score{.is_greedy = true};
  for (auto t = static_cast<size_t>(request.context); t < request.ids.size(); ++t) {
    const float* row = logits.data() + (t - 1) * vocabulary;
    double sum = 0;
    for (size_t v = 0; v < vocabulary; ++v) sum += std::exp(static_cast<double>(row[v]));
    const float logit = row[request.ids[t]];
    score.log_likelihood += static_cast<double>(logit) - std::log(sum);
    score.is_greedy = score.is_greedy && logit == *std::max_element(row, row + vocabulary);
    ++score.tokens;
  }
  return score;
}

TEST_F(SampleTasks, LogLikelihoodsAreThoseOfWholeLogits) {
  const std::vector<TaskItem> items = ReadTaskItems(kItems, 0);
  const TaskRequests requests = Encode(items, 63);
  const TaskScores scores = Score(items, requests);
  ASSERT_EQ(scores.items.size(), items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    ASSERT_EQ(scores.items[i].size(), items[i].requests.size());
    for (size_t c = 0; c < items[i].requests.size(); ++c) {
      const RequestScore expected =
          ScoreAlone(model_, RequestOf(requests, requests.request_offsets[i] + c));
      EXPECT_NEAR(scores.items[i][c].log_likelihood, expected.log_likelihood, kLikelihoodLimit);
      EXPECT_EQ(scores.items[i][c].tokens, expected.tokens);
      EXPECT_EQ(scores.items[i][c].is_greedy, expected.is_greedy);
    }
  }
}

// What the model itself would write is greedy, and anything else is not.
TEST_F(SampleTasks, GreedyContinuationsAreKnown) {
  const std::string context = "Question: ";
  std::vector<int32_t> ids = tokenizer_.Encode("Question:", false);
  const size_t given = ids.size();
  const auto vocabulary = static_cast<size_t>(model_.config().vocab_size);
  for (int i = 0; i < 4; ++i) {
    TokenSet tokens;
    tokens.Append(ids);
    const std::vector<float> logits = RunForward(model_, tokens).logits;
    const auto last = logits.end() - static_cast<int64_t>(vocabulary);
    ids.push_back(static_cast<int32_t>(std::max_element(last, logits.end()) - last));
  }
  std::vector<TaskItem> items = Items(R"({"task": "t", "context": "C", "target": "x"})");
  TaskRequests requests = Encode(items);
  requests.inputs = {};
  requests.inputs.Append(std::span(ids).first(ids.size() - 1));
  requests.targets.clear();
  for (size_t t = given; t < ids.size(); ++t) {
    requests.targets.push_back({static_cast<int64_t>(t) - 1, ids[t]});
  }
  requests.target_offsets = {0, requests.targets.size()};
  EXPECT_TRUE(Score(items, requests).items[0][0].is_greedy);
  requests.targets.back().id = requests.targets.back().id == 5 ? 6 : 5;
  EXPECT_FALSE(Score(items, requests).items[0][0].is_greedy);
}

TEST_F(SampleTasks, SameBitsHoweverItRuns) {
  std::vector<TaskItem> items;
  while (items.size() < 280) {  // more tokens than a tile
    for (TaskItem& item : ReadTaskItems(kItems, 0)) items.push_back(std::move(item));
  }
  const TaskRequests requests = Encode(items, 63);
  ASSERT_GT(requests.inputs.num_tokens(), kTileTokens);
  const TaskScores one = Score(items, requests, 1);
  EXPECT_TRUE(Score(items, requests, 2).items == one.items);
  EXPECT_TRUE(Score(items, requests, 3).items == one.items);
  EXPECT_TRUE(Score(items, requests, 2, {.spill_folder = folder_.path()}, true).items == one.items);
  EXPECT_TRUE(one.items.front() == one.items[items.size() / 2]);  // the same item twice
}

TEST_F(SampleTasks, AnswersOfOneTokenShareASequence) {
  const std::vector<TaskItem> items =
      Items(R"({"task": "t", "query": "A 1", "choices": ["1", "2", "3"], "gold": 0, "sep": ""})");
  const TaskRequests requests = Encode(items);
  ASSERT_EQ(requests.targets.size(), 3u);
  EXPECT_EQ(requests.inputs.num_sequences(), 1);
  const TaskScores scores = Score(items, requests);
  for (size_t c = 0; c < 3; ++c) {
    EXPECT_NEAR(scores.items[0][c].log_likelihood,
                ScoreAlone(model_, RequestOf(requests, c)).log_likelihood, kLikelihoodLimit);
  }
}

TEST_F(SampleTasks, RequestsThatCannotBeScoredAreRefused) {
  const std::vector<TaskItem> items = Items(
      R"({"task": "t", "query": "A question of a few words", "choices": ["yes", "a longer answer than that"], "gold": 0})");
  EXPECT_EQ(Encode(items).truncated, 0);
  const TaskRequests cut = Encode(items, 10);
  EXPECT_GT(cut.truncated, 0);
  EXPECT_LE(cut.inputs.longest(), 9);
  try {
    Encode(items, 4);  // the second choice alone has more
    ADD_FAILURE() << "accepted";
  } catch (const UsageError& error) {
    EXPECT_NE(std::string(error.what()).find("line 1: choice 1 has "), std::string::npos)
        << error.what();
    EXPECT_NE(error.hint().find("--max-length"), std::string::npos);
  }
  const std::vector<TaskItem> empty =
      Items(R"({"task": "t", "query": "", "choices": ["yes", "no"], "gold": 0})");
  EXPECT_NO_THROW(Encode(empty));
  EXPECT_THROW(EncodeRequests(empty, tokenizer_, {}), UsageError);  // nothing stands for it
  TaskRequests foreign = Encode(items);
  foreign.inputs.ids[0] = static_cast<int32_t>(model_.config().vocab_size);
  EXPECT_THROW(Score(items, foreign), UsageError);
}

TEST_F(SampleTasks, PlansWithinTheBudget) {
  const std::vector<TaskItem> items = ReadTaskItems(kItems, 0);
  const TaskRequests requests = Encode(items, 63);
  const EvalPlan ample =
      PlanTasks(model_, items, requests, {.memory_budget_bytes = kAmpleBytes}, 1);
  EXPECT_TRUE(ample.prefetch);
  EXPECT_FALSE(ample.spill);
  EXPECT_THROW(PlanTasks(model_, items, requests, {.memory_budget_bytes = 1 << 20}, 1),
               ResourceError);
}

// Items whose choices have lengths 1 and 4 bytes, 1 and 2 characters.
TaskItem Choice(const std::string& task, int32_t gold) {
  return {"f: line 1", task, {{"Q", " a"}, {"Q", " ßé"}}, {1, 2}, {1, 4}, gold};
}

TEST(TaskMetrics, AreTheFormulas) {
  const std::vector<TaskItem> items = {Choice("t", 0), Choice("u", 1), Choice("t", 1),
                                       Choice("t", 1)};
  // Sums -2, -3: acc takes 0; per character -2, -1.5 takes 1; per byte -2, -0.75 takes 1.
  // Sums -1, -3: acc 0; per character -1, -1.5: 0; per byte -1, -0.75: 1. Equal sums: the first.
  const TaskScores scores = {{{{-2, 1, false}, {-3, 2, false}},
                              {{-2, 1, false}, {-2, 2, false}},
                              {{-1, 1, false}, {-3, 2, false}},
                              {{-9, 1, false}, {-3, 2, false}}},
                             std::nullopt};
  const std::vector<TaskResult> results = SummarizeTasks(items, scores);
  ASSERT_EQ(results.size(), 2u);
  EXPECT_EQ(results[0].name, "t");
  EXPECT_EQ(results[0].items, (std::vector<size_t>{0, 2, 3}));
  ASSERT_EQ(results[0].accuracies.size(), 3u);
  EXPECT_EQ(results[0].accuracies[0].answers, (std::vector<int32_t>{0, 0, 1}));
  EXPECT_EQ(results[0].accuracies[1].answers, (std::vector<int32_t>{1, 0, 1}));
  EXPECT_EQ(results[0].accuracies[2].answers, (std::vector<int32_t>{1, 1, 1}));
  EXPECT_EQ(results[0].accuracies[1].name, "acc_norm");
  const Estimate acc = results[0].accuracies[0].mean;
  EXPECT_DOUBLE_EQ(acc.value, 2.0 / 3);
  EXPECT_DOUBLE_EQ(acc.standard_error.value(), std::sqrt(2.0 / 3 * (1.0 / 3) / 2));
  EXPECT_DOUBLE_EQ(results[0].accuracies[1].mean.value, 1.0 / 3);
  EXPECT_EQ(results[1].accuracies[0].answers, (std::vector<int32_t>{0}));
  EXPECT_FALSE(results[1].accuracies[0].mean.standard_error.has_value());
  // Means over tasks: errors add as squares.
  const Estimate mean = MeanOf(std::vector<Estimate>{{0.5, 0.03}, {0.7, 0.04}});
  EXPECT_DOUBLE_EQ(mean.value, 0.6);
  EXPECT_DOUBLE_EQ(mean.standard_error.value(), 0.025);
}

TEST(TaskMetrics, TargetsHavePerplexities) {
  const TaskItem target{"f: line 1", "l", {{"C", " word"}}, {4}, {4}, -1};
  const std::vector<TaskItem> items = {target, target};
  const TaskScores scores = {{{{-4, 2, true}}, {{-8, 4, false}}}, std::nullopt};
  const TaskResult result = SummarizeTasks(items, scores).at(0);
  EXPECT_DOUBLE_EQ(result.target->perplexity, std::exp(2.0));  // 12 over 6 tokens
  EXPECT_DOUBLE_EQ(*result.target->bits_per_byte, 12 / std::log(2.0) / 8);
  EXPECT_DOUBLE_EQ(result.target_perplexity.value(), std::exp(6.0));  // 12 over 2 targets
  EXPECT_DOUBLE_EQ(result.accuracies.at(0).mean.value, 0.5);
  const TaskScores unlikely = {{{{-4000, 2, true}}, {{-8, 4, false}}}, std::nullopt};
  EXPECT_FALSE(SummarizeTasks(items, unlikely).at(0).target_perplexity.has_value());
  const std::vector<TaskItem> mixed = {target, Choice("l", 0)};
  EXPECT_THROW(SummarizeTasks(mixed, {{{{-4, 2, true}}, {{-1, 1, true}, {-2, 1, true}}}, {}}),
               UsageError);
}

TEST(TaskMetrics, PairedChanges) {
  const Accuracy before{"acc", {0, 1, 2, 0, 3}, {1, 0, 0, 1, 0}, {}};
  const Accuracy after{"acc", {0, 2, 1, 1, 3}, {1, 1, 0, 0, 0}, {}};
  const AccuracyChange change = CompareAccuracy(before, after);
  EXPECT_EQ(change.changed, 3);
  EXPECT_EQ(change.gained, 1);
  EXPECT_EQ(change.lost, 1);
  EXPECT_DOUBLE_EQ(change.difference.value, 0);
  // Differences 0, 1, 0, -1, 0: sqrt(2 / 4 / 5).
  EXPECT_DOUBLE_EQ(change.difference.standard_error.value(), std::sqrt(0.1));
  EXPECT_EQ(change.p_value, 1);
  EXPECT_EQ(McNemarPValue(0, 0), 1);
  EXPECT_NEAR(McNemarPValue(0, 5), 2.0 / 32, 1e-15);
  EXPECT_NEAR(McNemarPValue(8, 2), 2.0 * (1 + 10 + 45) / 1024, 1e-15);
  EXPECT_LT(McNemarPValue(1000, 2000), 1e-70);
}

}  // namespace
}  // namespace winnow
