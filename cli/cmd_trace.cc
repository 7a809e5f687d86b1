// winnow trace: the forward pass laid open, for comparison with other implementations.
#include <fmt/format.h>

#include <cstring>
#include <map>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "forward/layer_sweep.h"
#include "forward/logits.h"
#include "pruning.h"
#include "session.h"
#include "text/text_source.h"
#include "weights/layer_reader.h"

namespace winnow::cli {
namespace {

struct TraceFlags {
  std::string model, ids, output, plan;
};

// Named arrays to be written; filled as the layers run.
class Trace : public MoeObserver {
 public:
  Trace(int64_t rows, int64_t row_tokens) : rows_(rows), row_tokens_(row_tokens) {}

  float* Floats(const std::string& name, int64_t columns) {
    Entry& entry = entries_[name];
    if (entry.floats.empty()) {
      entry.columns = columns;
      entry.floats.resize(static_cast<size_t>(rows_ * row_tokens_ * columns));
    }
    return entry.floats.data();
  }
  void OnTokens(const MoeTokens& m) override {
    const std::string prefix = fmt::format("layers.{}.", m.layer);
    const auto put = [&](const char* name, const float* data, int64_t columns) {
      std::memcpy(Floats(prefix + name, columns) + m.first_token * columns, data,
                  static_cast<size_t>(m.num_tokens * columns) * sizeof(float));
    };
    put("moe_in", m.input, m.hidden);
    put("router_logits", m.router_logits, m.num_experts);
    put("topk_weights", m.topk_weights, m.num_experts_per_tok);
    put("moe_routed", m.routed, m.hidden);
    put("moe_out", m.output, m.hidden);
    Entry& ids = entries_[prefix + "topk_ids"];
    ids.columns = m.num_experts_per_tok;
    ids.integers.resize(static_cast<size_t>(rows_ * row_tokens_ * ids.columns));
    for (int64_t i = 0; i < m.num_tokens * ids.columns; ++i) {
      ids.integers[static_cast<size_t>(m.first_token * ids.columns + i)] = m.topk_ids[i];
    }
  }
  void Write(const fs::path& path, std::span<const float> hidden, int64_t num_layers,
             int64_t width) {
    std::vector<TensorData> tensors;
    const auto b = static_cast<uint64_t>(rows_), t = static_cast<uint64_t>(row_tokens_);
    tensors.push_back({"hidden",
                       Dtype::kF32,
                       {static_cast<uint64_t>(num_layers) + 1, b, t, static_cast<uint64_t>(width)},
                       std::as_bytes(hidden)});
    for (const auto& [name, entry] : entries_) {
      const bool integers = !entry.integers.empty();
      tensors.push_back({name,
                         integers ? Dtype::kI64 : Dtype::kF32,
                         {b, t, static_cast<uint64_t>(entry.columns)},
                         integers ? std::as_bytes(std::span(entry.integers))
                                  : std::as_bytes(std::span(entry.floats))});
    }
    WriteSafetensors(path, tensors);
  }

 private:
  struct Entry {
    int64_t columns = 0;
    std::vector<float> floats;
    std::vector<int64_t> integers;
  };
  int64_t rows_, row_tokens_;
  std::map<std::string, Entry> entries_;
};

int RunTrace(Session& session, const TraceFlags& flags) {
  const Model model = Model::Open(flags.model);
  const TokenSequences rows = ReadTokenIds(flags.ids);
  TokenSet tokens{rows.ids, rows.offsets};
  const int64_t row_tokens = tokens.length(0);
  if (tokens.longest() * tokens.num_sequences() != tokens.num_tokens()) {
    throw UsageError(fmt::format("{}: trace needs rows of equal length", flags.ids),
                     "give input_ids as [rows, tokens]");
  }
  const int64_t context = model.config().max_position_embeddings;
  if (context > 0 && row_tokens > context) {
    session.Warn(
        fmt::format("rows of {} tokens exceed the model's context of {}", row_tokens, context));
  }
  RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  const int64_t h = model.config().hidden_size, num_layers = model.config().num_layers();
  const int64_t n = tokens.num_tokens();
  MemoryPlan plan;
  plan.Add("program", kProgramBytes);
  const LayerReaderOptions reading{.kept_experts = WhatIf(session, model, flags.plan)};
  plan.Add("weights of two layers", 2 * LayerReader::LargestLayerBytes(model, reading));
  plan.Add("hidden states of all layers", HiddenStates::Bytes(n * (num_layers + 2), h));
  plan.Add("logits", HiddenStates::Bytes(n, model.config().vocab_size));
  plan.Add("work of a tile",
           LayerSweep::ScratchBytes(model, tokens, false, session.pool().num_threads()));
  session.RequireMemory(plan, "trace");
  if (session.flags.dry_run) {
    session.PrintDryRun("trace", {{"tokens", n}});
    return 0;
  }
  Trace trace(tokens.num_sequences(), row_tokens);
  LayerReader reader(model, reading);
  LayerSweep sweep(model, tokens, session.pool(), session.control(), "trace", session.compute());
  HiddenStates states(n, h);
  std::vector<float> hidden(static_cast<size_t>((num_layers + 1) * n * h));
  const auto keep = [&](int64_t layer) {
    std::memcpy(hidden.data() + layer * n * h, states.Load(0, n),
                static_cast<size_t>(n * h) * sizeof(float));
  };
  sweep.Embed(states);
  keep(0);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    sweep.RunLayer(layer, reader.Get(layer), states, &trace);
    keep(layer + 1);
  }
  ComputeLogits(model, session.pool(), states.Load(0, n), n,
                trace.Floats("logits", model.config().vocab_size));
  trace.Write(flags.output, hidden, num_layers, h);
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.trace/1"}, {"output", flags.output}, {"tokens", n}});
  } else {
    session.Note(fmt::format("wrote {}", flags.output));
  }
  return 0;
}

}  // namespace

void AddTrace(CLI::App& app, Session& session) {
  auto flags = std::make_shared<TraceFlags>();
  CLI::App* verb =
      app.add_subcommand("trace", "Write hidden states, routing and logits of given tokens");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("--ids", flags->ids, "safetensors file with input_ids [rows, tokens]")
      ->required();
  verb->add_option("-o,--output", flags->output, "safetensors file to write")
      ->required()
      ->transform(OutputPath);
  verb->add_option("--plan", flags->plan, "Behave as if this plan were applied (without skipping)");
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, false);
  session.AddReportFlags(*verb);
  verb->footer(
      "Example: winnow trace MODEL --ids ids.safetensors -o trace.safetensors --compute f32");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunTrace(session, *flags); };
  });
}

}  // namespace winnow::cli
