// Whole runs: the published program's steps, resuming to the same bytes, early stop, schedules,
// rows.
#include <gtest/gtest.h>

#include <cmath>

#include "apply/checkpoint_rewriter.h"
#include "train/test_support.h"

namespace winnow {
namespace {

fs::path Data(const std::string& name) {
  return fs::path(WINNOW_TEST_DATA) / "finetune" / name;
}

TrainOptions Options(const Model& model, const std::string& what, int64_t steps) {
  TrainOptions options;
  options.parameters = ChooseParameters(model, what);
  options.schedule = {.shape = ScheduleShape::kConstant, .peak = 1e-3, .total_steps = steps};
  options.memory_budget_bytes = uint64_t{1} << 30;
  return options;
}

TrainResult Train(const Model& model, const TrainRows& rows, const TrainOptions& options,
                  const fs::path& folder, const JobControl& control = {}) {
  ThreadPool pool(2);
  const TrainPlan plan = PlanTrain(model, rows, options, pool.num_threads());
  return RunTrain(model, rows, options, plan, folder, pool, control, [](const StepRecord&) {});
}

std::vector<float> Tuned(const TrainResult& result, const std::string& tensor) {
  const SafetensorsFile file = SafetensorsFile::Open(result.weights);
  return ReadArray<float>(file, tensor);
}

TEST(Run, FollowsThePublishedSteps) {
  const Model model = Model::Open(Data("tiny"));
  const Json run = ParseJson(ReadTextFile(Data("values.json")), "values.json")["sr3"];
  const SafetensorsFile arrays = SafetensorsFile::Open(Data("values.safetensors"));
  const std::vector<int32_t> ids = ReadIntegers(arrays, "full.input_ids");
  TrainRows data;
  for (size_t first = 0; first < ids.size(); first += 256) {
    TrainRow row;
    row.ids.assign(ids.begin() + static_cast<std::ptrdiff_t>(first),
                   ids.begin() + static_cast<std::ptrdiff_t>(first) + 256);
    data.rows.push_back(std::move(row));
  }
  data.steps = run["rows"].get<std::vector<std::vector<int32_t>>>();
  TrainOptions options = Options(model, "condensed-experts", 4);
  options.schedule = {.shape = ScheduleShape::kPublished, .peak = run["peak_lr"], .total_steps = 4};
  options.pass.balance_alpha = 0.001;
  const TestFolder folder;
  const TrainResult result = Train(model, data, options, folder.path() / "work");
  ASSERT_EQ(result.steps.size(), data.steps.size());
  for (size_t s = 0; s < result.steps.size(); ++s) {
    const StepRecord& step = result.steps[s];
    EXPECT_DOUBLE_EQ(step.lr, run["lr"][s].get<double>());
    // What the published program's own f32 is good to, and some.
    EXPECT_NEAR(step.loss, run["loss"][s].get<double>(), 1e-5);
    const double norm = run["grad_norm"][s];
    EXPECT_NEAR(step.gradient_norm, norm, 1e-5 * norm);
  }
  for (const Parameter& p : options.parameters) {
    const std::vector<float> tuned = Tuned(result, p.Name());
    std::vector<float> before(tuned.size());
    model.checkpoint().ReadPart(*p.slice.tensor, 0, std::as_writable_bytes(std::span(before)));
    double moved = 0;
    for (size_t i = 0; i < tuned.size(); ++i) {
      moved += std::pow(static_cast<double>(tuned[i]) - static_cast<double>(before[i]), 2);
    }
    const double expected = run["delta_norm"][p.Name()];
    // At this rate a step is few units in the last place of f32 weights.
    EXPECT_NEAR(std::sqrt(moved), expected, 5e-3 * expected) << p.Name();
  }
}

class Runs : public testing::Test {
 protected:
  Runs() : model_(Model::Open(GoldenFolder("deepseek-bf16"))) {
    data_ = RandomRows(12, 16, model_.config().vocab_size);
    data_.steps = {{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {2, 1, 0}, {8, 3, 4}};
    data_.held_out = {9, 10, 11};
    options_ = Options(model_, "experts,router", 5);
    options_.eval_every = 2;
    options_.checkpoint_seconds = 0;  // after every step
  }
  Model model_;
  TrainRows data_;
  TrainOptions options_;
  TestFolder folder_;
};

// Stopped wherever an interruption may come, and resumed, with its state spilled or not.
TEST_F(Runs, ResumeToTheSameBytes) {
  const TrainResult whole = Train(model_, data_, options_, folder_.path() / "whole");
  const std::string expected = ReadTextFile(whole.weights);
  for (const int64_t stop_after : {1, 2, 4}) {
    const fs::path work = folder_.path() / ("stopped-" + std::to_string(stop_after));
    std::atomic<bool> interrupted{false};
    JobControl control;
    control.interrupted = &interrupted;
    control.on_progress = [&](const ProgressEvent& event) {
      if (event.layer + 1 == stop_after) interrupted = true;
    };
    TrainOptions options = options_;
    EXPECT_THROW(Train(model_, data_, options, work, control), InterruptedError);
    options.resume = true;
    const TrainResult resumed = Train(model_, data_, options, work);
    EXPECT_TRUE(ReadTextFile(resumed.weights) == expected) << stop_after;
    ASSERT_EQ(resumed.steps.size(), whole.steps.size());
    for (size_t s = 0; s < whole.steps.size(); ++s) {
      EXPECT_EQ(resumed.steps[s].loss, whole.steps[s].loss);
      EXPECT_EQ(resumed.steps[s].held_out, whole.steps[s].held_out);
    }
    EXPECT_EQ(resumed.held_out_before, whole.held_out_before);
  }
  TrainOptions other = options_;
  other.resume = true;
  other.schedule.peak = 2e-3;
  EXPECT_THROW(Train(model_, data_, other, folder_.path() / "whole"), UsageError);
}

TEST_F(Runs, SmallBudgetsSpillAndChangeNothing) {
  const TrainResult roomy = Train(model_, data_, options_, folder_.path() / "roomy");
  TrainOptions small = options_;
  ThreadPool pool(2);
  TrainPlan plan = PlanTrain(model_, data_, small, 2);
  EXPECT_TRUE(plan.resident && plan.keep_tapes);
  plan = {};
  plan.spill_state = plan.spill_streams = true;
  const TrainResult tight = RunTrain(model_, data_, small, plan, folder_.path() / "tight", pool, {},
                                     [](const StepRecord&) {});
  EXPECT_TRUE(ReadTextFile(tight.weights) == ReadTextFile(roomy.weights));
  small.memory_budget_bytes = 1 << 20;
  EXPECT_THROW(PlanTrain(model_, data_, small, 2), ResourceError);
}

TEST_F(Runs, LearnAndKeepTheBest) {
  // The rows that judge are those that are learnt, so the score falls.
  data_.held_out = {0, 1, 2};
  data_.steps.assign(12, {0, 1, 2});
  options_.eval_every = 1;
  options_.patience = 2;
  options_.schedule.peak = 3e-3;
  const TrainResult result = Train(model_, data_, options_, folder_.path() / "work");
  ASSERT_TRUE(result.held_out_before && result.held_out_after);
  EXPECT_LT(*result.held_out_after, *result.held_out_before - 0.05);
  EXPECT_LT(result.steps.back().loss, result.steps.front().loss);
  data_.held_out = {9, 10, 11};  // of which the others say nothing: what is learnt by heart hurts
  options_.schedule.peak = 0.02;
  const TrainResult wild = Train(model_, data_, options_, folder_.path() / "wild");
  EXPECT_TRUE(wild.stopped_early);
  EXPECT_LE(*wild.held_out_after, *wild.held_out_before);
}

// The checkpoint holds the tuned weights, as stored or in f32, and every other tensor unchanged.
TEST_F(Runs, BecomeACheckpoint) {
  for (const std::optional<Dtype> dtype : {std::optional<Dtype>{}, {Dtype::kF32}}) {
    const fs::path out = folder_.path() / (dtype ? "f32" : "bf16");
    options_.dtype = dtype;
    const TrainResult result = Train(model_, data_, options_, folder_.path() / "work");
    const WeightReplacements weights = TrainedWeights(options_.parameters, result.weights);
    ApplyOptions apply;
    apply.replacements = &weights;
    apply.dtype = dtype;
    CompressionPlan plan;
    for (const int32_t layer : model_.config().MoeLayers()) {
      LayerPlan all;
      all.layer = layer;
      for (int32_t e = 0; e < 8; ++e) all.kept.push_back(e);
      plan.layers.push_back(all);
    }
    ApplyPlan(model_, plan, PlanRewrite(model_, plan, apply), apply, out, {});
    const Model tuned = Model::Open(out);
    const SafetensorsFile file = SafetensorsFile::Open(result.weights);
    int64_t changed = 0;
    for (const TensorInfo& stored : model_.checkpoint().tensors()) {
      const TensorInfo* tensor = &stored;
      const TensorInfo* now = tuned.checkpoint().Find(tensor->name);
      ASSERT_NE(now, nullptr);
      EXPECT_EQ(now->dtype, dtype.value_or(tensor->dtype));
      const TensorInfo* trained = file.Find(tensor->name);
      const TensorInfo* source = trained != nullptr ? trained : tensor;
      std::vector<std::byte> expected(static_cast<size_t>(source->bytes)), found(now->bytes);
      if (trained != nullptr) {
        file.Read(*trained, expected);
        ++changed;
      } else {
        model_.checkpoint().ReadPart(*tensor, 0, expected);
      }
      tuned.checkpoint().ReadPart(*now, 0, found);
      const size_t count = found.size() * 8 / DtypeBits(now->dtype);
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(LoadAsFloat(now->dtype, found.data(), i),
                  LoadAsFloat(source->dtype, expected.data(), i))
            << tensor->name;
      }
    }
    EXPECT_EQ(changed, static_cast<int64_t>(options_.parameters.size()));
  }
}

TEST_F(Runs, PureBf16StaysOnItsGrid) {
  options_.pure_bf16 = true;
  options_.resume = false;
  const TrainResult result = Train(model_, data_, options_, folder_.path() / "work");
  const SafetensorsFile file = SafetensorsFile::Open(result.weights);
  for (const TensorInfo& tensor : file.tensors()) EXPECT_EQ(tensor.dtype, Dtype::kBF16);
  EXPECT_LT(result.steps[3].loss, result.steps[0].loss);  // the same rows, learnt once
}

TEST(Schedule, ShapesAndEnds) {
  Schedule s{.shape = ScheduleShape::kPublished, .peak = 1e-5, .total_steps = 4};
  EXPECT_DOUBLE_EQ(LearningRate(s, 0), 1e-5);
  EXPECT_DOUBLE_EQ(LearningRate(s, 1), 7.5e-6);
  EXPECT_DOUBLE_EQ(LearningRate(s, 4), 5e-11);
  s = {.shape = ScheduleShape::kCosine, .peak = 1, .total_steps = 100};
  EXPECT_DOUBLE_EQ(LearningRate(s, 0), 0.25);  // three steps of warm-up
  EXPECT_DOUBLE_EQ(LearningRate(s, 3), 1);
  EXPECT_NEAR(LearningRate(s, 100), 0.1, 1e-12);
  s.shape = ScheduleShape::kLinear;
  EXPECT_GT(LearningRate(s, 50), LearningRate(s, 51));
}

TEST(Rows, AreHeldOutAndShuffledByRule) {
  EXPECT_EQ(HeldOutRows(40, 0.05), (std::vector<int32_t>{19, 39}));
  EXPECT_TRUE(HeldOutRows(10, 0.05).empty());
  const auto steps = ShuffledSteps({0, 1, 2, 3, 4}, 2, 2, 42, 0);
  ASSERT_EQ(steps.size(), 6u);
  EXPECT_EQ(steps[2].size(), 1u);
  EXPECT_EQ(ShuffledSteps({0, 1, 2, 3, 4}, 2, 2, 42, 0), steps);
  EXPECT_EQ(ShuffledSteps({0, 1, 2, 3, 4}, 2, 2, 42, 4).size(), 4u);
}

TEST(Rows, PredictTheNextTokenThatCounts) {
  TrainRow row;
  row.ids = {5, 6, 7, 8};
  row.weights = {0, 0, 1, 1};
  const std::vector<int32_t> numbers = {0};
  const TrainBatch batch = MakeBatch({row}, numbers);
  EXPECT_EQ(batch.targets, (std::vector<int32_t>{-1, 7, 8, -1}));
}

TEST(Trainable, PatternsAndKinds) {
  EXPECT_TRUE(MatchesPattern("model.layers.3.mlp", "model.*.3.*"));
  EXPECT_FALSE(MatchesPattern("model.layers.3.mlp", "model.?.3.*"));
  const Model model = Model::Open(GoldenFolder("deepseek-bf16"));
  EXPECT_THROW(ChooseParameters(model, "condensed-experts"), UsageError);
  EXPECT_THROW(ChooseParameters(model, "experts,lm_head*"), UsageError);
  EXPECT_EQ(ChooseParameters(model, "router").size(), model.config().MoeLayers().size());
}

}  // namespace
}  // namespace winnow
