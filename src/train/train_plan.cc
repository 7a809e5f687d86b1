// What a run of train_run.h will hold.
#include <algorithm>

#include "train/train_run.h"

namespace winnow {
namespace {

struct Sizes {
  int64_t batch_tokens = 0;  // of the largest step
  int64_t part_tokens = 0;   // of the largest part
  int64_t longest = 0;
};

void Measure(const TrainRows& rows, const std::vector<int32_t>& numbers, int64_t micro_batch,
             Sizes& sizes) {
  const int64_t part_rows = micro_batch > 0 ? micro_batch : std::ssize(numbers);
  int64_t total = 0, part = 0, in_part = 0;
  for (const int32_t number : numbers) {
    const int64_t length = std::ssize(rows.rows[static_cast<size_t>(number)].ids);
    if (in_part++ == part_rows) {
      part = 0;
      in_part = 1;
    }
    part += length;
    total += length;
    sizes.part_tokens = std::max(sizes.part_tokens, part);
    sizes.longest = std::max(sizes.longest, length);
  }
  sizes.batch_tokens = std::max(sizes.batch_tokens, total);
}

uint64_t HeadBytes(const Model& model) {
  return model.lm_head().bytes();
}

}  // namespace

TrainPlan PlanTrain(const Model& model, const TrainRows& rows, const TrainOptions& options,
                    int num_threads) {
  const ModelConfig& config = model.config();
  const int64_t h = config.hidden_size, layers = config.num_layers();
  const Model* teacher = options.pass.teacher;
  Sizes sizes;
  for (const std::vector<int32_t>& step : rows.steps) {
    Measure(rows, step, options.pass.micro_batch, sizes);
  }
  const size_t group = rows.steps.empty() ? 1 : rows.steps.front().size();
  for (size_t first = 0; first < rows.held_out.size(); first += group) {
    const size_t end = std::min(rows.held_out.size(), first + group);
    Measure(rows,
            {rows.held_out.begin() + static_cast<std::ptrdiff_t>(first),
             rows.held_out.begin() + static_cast<std::ptrdiff_t>(end)},
            options.pass.micro_batch, sizes);
  }
  int64_t lowest = layers, compared = 0;
  std::vector<uint8_t> trained(static_cast<size_t>(layers));
  uint64_t count = 0;
  for (const Parameter& p : options.parameters) {
    count += p.count;
    if (p.layer < 0) continue;
    lowest = std::min<int64_t>(lowest, p.layer);
    compared +=
        options.pass.distill == Distill::kLayers && trained[static_cast<size_t>(p.layer)]++ == 0
            ? 1
            : 0;
  }
  uint64_t tape = 0, all_tapes = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const LayerConfig& layer = config.layers[static_cast<size_t>(l)];
    tape = std::max(tape, LayerGradient::TapeBytes(config, layer, sizes.part_tokens));
    if (l >= lowest) all_tapes += LayerGradient::TapeBytes(config, layer, sizes.batch_tokens);
  }
  const uint64_t stream =
      static_cast<uint64_t>(sizes.batch_tokens) * static_cast<uint64_t>(h) * sizeof(float);
  const uint64_t part_stream =
      static_cast<uint64_t>(sizes.part_tokens) * static_cast<uint64_t>(h) * sizeof(float);
  uint64_t row_bytes = 0;
  for (const TrainRow& row : rows.rows) {
    row_bytes += row.ids.size() * 4 + row.weights.size() * 4 + row.mask.size() + sizeof(TrainRow);
  }
  struct Way {
    bool resident, prefetch, tapes, spill_streams, spill_state;
  };
  TrainPlan plan;
  for (const Way& way : {Way{true, false, true, false, false},
                         {true, false, false, false, false},
                         {false, true, true, false, false},
                         {false, true, false, false, false},
                         {false, false, false, false, false},
                         {false, true, false, false, true},
                         {false, false, false, false, true},
                         {false, false, false, true, true}}) {
    plan = {};
    plan.resident = way.resident;
    plan.prefetch = way.prefetch;
    plan.keep_tapes = way.tapes;
    plan.spill_state = way.spill_state;
    plan.spill_streams = way.spill_streams;
    MemoryPlan& memory = plan.memory;
    memory.Add("program", kProgramBytes);
    memory.Add("rows and token ids", row_bytes + static_cast<uint64_t>(sizes.batch_tokens) * 64);
    const auto weights = [&](const Model& m, const char* whole, const char* part) {
      const LayerReaderOptions reading{.prefetch = way.prefetch};
      if (way.resident) {
        memory.Add(whole, LayerReader::AllLayersBytes(m, reading) + HeadBytes(m));
      } else {
        memory.Add(part, (way.prefetch ? 2 : 1) * LayerReader::LargestLayerBytes(m, reading) +
                             HeadBytes(m));
      }
    };
    weights(model, "all weights", way.prefetch ? "two layers and lm_head" : "a layer and lm_head");
    memory.Add(way.spill_state ? "a layer's trained weights and gradients (the rest on disk)"
                               : "trained weights, gradients and moments",
               ParameterStore::MemoryBytes(options.parameters, way.spill_state, layers));
    const auto levels = static_cast<uint64_t>(std::max<int64_t>(0, layers - lowest) + 1 + compared);
    memory.Add(way.spill_streams ? "streams of a part (the rest on disk), gradient of the stream"
                                 : "streams at the layers' entries and their gradient",
               way.spill_streams ? 4 * part_stream + stream : (levels + 1) * stream);
    memory.Add(way.tapes ? "intermediates of all layers" : "intermediates of a layer",
               way.tapes ? std::max(tape, all_tapes) : tape);
    memory.Add("work of a layer",
               LayerGradient::ScratchBytes(config, sizes.part_tokens, sizes.longest, num_threads));
    memory.Add("logits", OutputLoss::ScratchBytes(h, config.vocab_size, teacher != nullptr));
    if (teacher != nullptr) {
      weights(*teacher, "the teacher's weights",
              way.prefetch ? "two layers and lm_head of the teacher"
                           : "a layer and lm_head of the teacher");
      uint64_t teacher_tape = 0;
      for (const LayerConfig& layer : teacher->config().layers) {
        teacher_tape = std::max(
            teacher_tape, LayerGradient::TapeBytes(teacher->config(), layer, sizes.part_tokens));
      }
      memory.Add("the teacher's stream and work",
                 teacher_tape +
                     stream * static_cast<uint64_t>(teacher->config().hidden_size) /
                         static_cast<uint64_t>(h) +
                     LayerGradient::ScratchBytes(teacher->config(), sizes.part_tokens,
                                                 sizes.longest, num_threads));
    }
    // Saved twice for a moment: the old copy goes when the new one is whole.
    plan.bytes_to_write = count * sizeof(float) * (way.spill_state ? 11 : 7) +
                          (way.spill_streams ? levels * stream : 0);
    if (memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

}  // namespace winnow
