// Gradients: against the published program's, against differences of the loss for every family and
// property, and the same bits however memory is saved.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "train/batch_pass.h"
#include "train/test_support.h"

namespace winnow {
namespace {

fs::path Data(const std::string& name) {
  return fs::path(WINNOW_TEST_DATA) / "finetune" / name;
}

std::vector<float> Gradients(ParameterStore& store) {
  std::vector<float> all;
  store.ForPieces(
      ParameterStore::kGradient,
      [&](uint64_t, std::span<float> values) {
        all.insert(all.end(), values.begin(), values.end());
      },
      false);
  return all;
}

TEST(Published, FirstGradientsOfEveryTensor) {
  const Model model = Model::Open(Data("tiny"));
  const Json values = ParseJson(ReadTextFile(Data("values.json")), "values.json");
  const SafetensorsFile arrays = SafetensorsFile::Open(Data("values.safetensors"));
  ThreadPool pool(2);
  const JobControl control;
  for (const auto& [name, run] : values.items()) {
    SCOPED_TRACE(name);
    const std::string data = run["data"];
    const std::vector<int32_t> ids = ReadIntegers(arrays, data + ".input_ids");
    const std::vector<int32_t> mask = ReadIntegers(arrays, data + ".attention_mask");
    std::vector<TrainRow> rows;
    for (size_t first = 0; first < ids.size(); first += 256) {
      const auto at = static_cast<std::ptrdiff_t>(first);
      TrainRow row;
      row.ids.assign(ids.begin() + at, ids.begin() + at + 256);
      row.mask.assign(mask.begin() + at, mask.begin() + at + 256);
      rows.push_back(std::move(row));
    }
    ParameterStore store(model, ChooseParameters(model, "condensed-experts"), {}, pool);
    BatchPass pass(model, store, {.balance_alpha = 0.001}, pool, control);
    const std::vector<int32_t> first_rows = run["rows"][0];
    const PassResult result = pass.Run(MakeBatch(rows, first_rows), true);
    // The published program in f32 is within 2e-6 of itself in f64 (loss) and 7e-7 (gradients).
    EXPECT_NEAR(result.loss, run["loss"][0].get<double>(), 1e-5);
    const std::vector<float> gradients = Gradients(store);
    for (const Parameter& p : store.parameters()) {
      const std::string tensor = p.Name();
      double norm = 0;
      for (uint64_t i = 0; i < p.count; ++i) {
        const auto g = static_cast<double>(gradients[p.offset + i]);
        norm += g * g;
      }
      const double expected = run["first_grad_norm"][tensor];
      EXPECT_NEAR(std::sqrt(norm), expected, 1e-5 * expected) << tensor;
      if (name != "sr3") continue;
      const std::vector<float> reference = ReadArray<float>(arrays, "first_grad." + tensor);
      double error = 0;
      for (uint64_t i = 0; i < p.count; ++i) {
        const double d =
            static_cast<double>(gradients[p.offset + i]) - static_cast<double>(reference[i]);
        error += d * d;
      }
      EXPECT_LT(std::sqrt(error), 1e-5 * expected) << tensor;
    }
  }
}

struct Case {
  const char* name;
  const char* source;
  int condensed = -1;
  bool fused = false;
  std::function<void(OrderedJson&)> edit = nullptr;
};

// The slope of the loss along each tensor's own gradient is the gradient's norm.
void ExpectSlopes(const fs::path& folder, double balance_alpha) {
  const Model model = Model::Open(folder);
  ThreadPool pool(2);
  const JobControl control;
  // f32 masters of bf16 weights, so that small changes are not rounded away.
  ParameterStore store(model, ChooseParameters(model, "model.layers.*,norms"),
                       {.dtype = Dtype::kF32}, pool);
  BatchPass pass(model, store, {.balance_alpha = balance_alpha}, pool, control);
  const TrainRows data = RandomRows(4, 9, model.config().vocab_size);
  const std::vector<int32_t> numbers = {0, 1, 2, 3};
  const TrainBatch batch = MakeBatch(data.rows, numbers);
  pass.Run(batch, true);
  const std::vector<float> gradients = Gradients(store);
  std::vector<float> masters;
  store.ForPieces(
      ParameterStore::kMaster,
      [&](uint64_t, std::span<float> values) {
        masters.insert(masters.end(), values.begin(), values.end());
      },
      false);
  int64_t compared = 0;
  for (const Parameter& p : store.parameters()) {
    double norm = 0, size = 0;
    for (uint64_t i = p.offset; i < p.offset + p.count; ++i) {
      norm += static_cast<double>(gradients[i]) * static_cast<double>(gradients[i]);
      size += static_cast<double>(masters[i]) * static_cast<double>(masters[i]);
    }
    norm = std::sqrt(norm);
    if (norm == 0) continue;  // an expert no token chose
    const auto loss_at = [&](double moved) {
      store.ForPieces(
          ParameterStore::kMaster,
          [&](uint64_t first, std::span<float> values) {
            for (size_t i = 0; i < values.size(); ++i) {
              const uint64_t at = first + i;
              values[i] = masters[at];
              if (at < p.offset || at >= p.offset + p.count) continue;
              values[i] += static_cast<float>(moved / norm * static_cast<double>(gradients[at]));
            }
          },
          true);
      return pass.Run(batch, false).loss;
    };
    // Where a step changes which experts a token uses the loss jumps: that step says nothing, a
    // shorter one may. A wrong gradient disagrees with all of them.
    double best = kInfinity, best_slope = 0;
    for (const double share : {1e-3, 3e-4, 1e-4, 3e-5}) {
      const double step = share * std::max(std::sqrt(size), 0.1);
      const double slope = (loss_at(step) - loss_at(-step)) / (2 * step);
      // The loss in f32 is good to about 1e-6; the curvature changes the slope by less than 1 %.
      const double off = std::abs(slope - norm) / (0.01 * norm + 1e-6 / step);
      if (off < best) {
        best = off;
        best_slope = slope;
        if (off < 1 && norm * step > 1e-4) ++compared;
      }
      if (off < 1) break;
    }
    EXPECT_LT(best, 1) << p.Name() << ": slope " << best_slope << ", gradient " << norm;
  }
  EXPECT_GT(compared, 5);  // most of all tensors are well above the noise
}

class Slopes : public testing::TestWithParam<Case> {};

TEST_P(Slopes, EqualGradients) {
  const Case& c = GetParam();
  const TestFolder folder;
  const fs::path path = folder.path() / "model";
  if (c.condensed >= 0) {
    WriteCondensed(c.source, c.condensed, c.fused, path);
  } else {
    CopyFolder(GoldenFolder(c.source), path);
  }
  if (c.edit) EditConfig(path, c.edit);
  ExpectSlopes(path, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Families, Slopes,
    testing::Values(
        Case{"mixtral", "mixtral"}, Case{"fused_tensors", "mixtral-bf16-fused"},
        Case{"whole_norm", "olmoe"}, Case{"gated_shared_and_bias", "qwen2_moe"},
        Case{"head_norm", "qwen3_moe-bf16"}, Case{"dense_layer", "qwen3_moe-dense-layer"},
        Case{"shared", "deepseek-bf16"}, Case{"condensed", "deepseek-bf16", 1},
        Case{"condensed_gated", "qwen2_moe", 1}, Case{"fused", "deepseek-bf16", 1, true},
        Case{"fused_gated", "qwen2_moe", 1, true},
        Case{"window", "mixtral", -1, false, [](OrderedJson& c) { c["sliding_window"] = 4; }},
        Case{"clipped", "olmoe", -1, false, [](OrderedJson& c) { c["clip_qkv"] = 0.9; }},
        Case{"renormalised", "olmoe", -1, false,
             [](OrderedJson& c) { c["norm_topk_prob"] = true; }}),
    [](const auto& tested) { return std::string(tested.param.name); });

// The gradients of everything, for ways that must not change a bit.
std::vector<float> GradientsWith(const Model& model, const PassOptions& options, int threads,
                                 const fs::path& spill) {
  ThreadPool pool(threads);
  const JobControl control;
  ParameterStore store(model, ChooseParameters(model, "model.layers.1.*,model.layers.2.*,norms"),
                       {.spill = spill}, pool);
  BatchPass pass(model, store, options, pool, control);
  const TrainRows data = RandomRows(5, 20, model.config().vocab_size);
  const std::vector<int32_t> numbers = {4, 1, 2, 0, 3};
  pass.Run(MakeBatch(data.rows, numbers), true);
  return Gradients(store);
}

TEST(Ways, OfSavingMemoryChangeNothing) {
  const TestFolder folder;
  const Model model = Model::Open(GoldenFolder("qwen2_moe"));
  const std::vector<float> expected =
      GradientsWith(model, {.resident = true, .keep_tapes = true}, 1, {});
  EXPECT_EQ(GradientsWith(model, {}, 3, {}), expected);
  EXPECT_EQ(GradientsWith(model, {.prefetch = true, .keep_tapes = true}, 2, {}), expected);
  EXPECT_EQ(GradientsWith(model, {.prefetch = true, .spill_folder = folder.path()}, 2,
                          folder.path() / "state.spill"),
            expected);
  // Parts of a batch: other orders of sums, so equal to rounding alone.
  const std::vector<float> parts = GradientsWith(model, {.micro_batch = 2}, 2, {});
  double error = 0, size = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    error += std::pow(static_cast<double>(parts[i] - expected[i]), 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  EXPECT_LT(std::sqrt(error / size), 1e-5);
}

// Learning from a teacher that is the model itself: no divergence, no gradient.
TEST(Distillation, FromItselfTeachesNothing) {
  const Model model = Model::Open(GoldenFolder("mixtral"));
  for (const Distill distill : {Distill::kLogits, Distill::kLayers}) {
    ThreadPool pool(2);
    const JobControl control;
    ParameterStore store(model, ChooseParameters(model, "experts"), {}, pool);
    PassOptions options;
    options.teacher = &model;
    options.distill = distill;
    BatchPass pass(model, store, options, pool, control);
    const TrainRows data = RandomRows(2, 12, model.config().vocab_size);
    const std::vector<int32_t> numbers = {0, 1};
    EXPECT_NEAR(pass.Run(MakeBatch(data.rows, numbers), true).loss, 0, 1e-9);
    EXPECT_LT(store.GradientNorm(), 1e-4);  // p - p* and h - h* in f32
  }
}

// Both kinds against slopes of the loss: the student is the teacher with other norms.
TEST(Distillation, GradientsEqualSlopes) {
  const Model teacher = Model::Open(GoldenFolder("olmoe"));
  const TestFolder folder;
  const Model model = Model::Open(CopyFolder(GoldenFolder("olmoe"), folder.path() / "student"));
  for (const Distill distill : {Distill::kLogits, Distill::kLayers}) {
    for (const double share : {1.0, 0.5}) {
      ThreadPool pool(2);
      const JobControl control;
      ParameterStore store(model, ChooseParameters(model, "model.layers.1.*"), {}, pool);
      PassOptions options;
      options.teacher = &teacher;
      options.distill = distill;
      options.distill_weight = share;
      BatchPass pass(model, store, options, pool, control);
      const TrainRows data = RandomRows(2, 12, model.config().vocab_size);
      const std::vector<int32_t> numbers = {0, 1};
      const TrainBatch batch = MakeBatch(data.rows, numbers);
      uint32_t state = 7;
      store.ForPieces(
          ParameterStore::kMaster,
          [&](uint64_t, std::span<float> values) {
            for (float& value : values) {
              state = state * 1664525u + 1013904223u;
              value *= 1 + 0.2f * (static_cast<float>(state >> 8) / 16777216.0f - 0.5f);
            }
          },
          true);
      pass.Run(batch, true);
      const std::vector<float> gradients = Gradients(store);
      const double norm = store.GradientNorm();
      const double step = 2e-3 / norm * 0.5;
      const auto move = [&](double distance) {
        store.ForPieces(
            ParameterStore::kMaster,
            [&](uint64_t first, std::span<float> values) {
              for (size_t i = 0; i < values.size(); ++i) {
                values[i] +=
                    static_cast<float>(distance / norm * static_cast<double>(gradients[first + i]));
              }
            },
            true);
        return pass.Run(batch, false).loss;
      };
      const double up = move(step), down = move(-2 * step);
      // A change of 2e-3 of a loss good to 2e-6, and its curvature.
      EXPECT_NEAR((up - down) / (2 * step), norm, 0.02 * norm)
          << static_cast<int>(distill) << " " << share;
    }
  }
}

}  // namespace
}  // namespace winnow
