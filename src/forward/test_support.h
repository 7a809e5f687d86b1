// For tests: a forward pass over a token set with everything it computes kept.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "forward/layer_sweep.h"   // LayerSweep
#include "forward/logits.h"        // ComputeLogits
#include "forward/moe_observer.h"  // MoeObserver
#include "model/test_support.h"    // GoldenFolder
#include "weights/layer_reader.h"  // LayerReader

namespace winnow {

struct TracedLayer {
  std::vector<float> residual, router_logits, topk_weights, routed, moe_out;
  std::vector<float> expert_outputs;  // [n, E, hidden], if asked for
  std::vector<int32_t> topk_ids;
};

struct ForwardTrace {
  std::vector<float> hidden;  // [n, hidden] after the last layer
  std::vector<float> logits;  // [n, V]
  std::map<int64_t, TracedLayer> layers;
};

enum class Watch { kNobody, kRouting, kSelectedOutputs, kExpertOutputs };

struct ForwardOptions {
  int threads = 1;
  bool prefetch = false;
  Watch watch = Watch::kRouting;
  fs::path spill = {};  // the stream lives in this file; empty: in memory
  std::vector<std::vector<int32_t>> kept_experts = {};
  bool logits = true;
};

class TraceObserver : public MoeObserver {
 public:
  TraceObserver(ForwardTrace& trace, Watch watch) : trace_(trace), watch_(watch) {}
  bool WantsExpertOutputs() const override { return watch_ == Watch::kExpertOutputs; }
  bool WantsSelectedOutputs() const override { return watch_ == Watch::kSelectedOutputs; }
  void OnTokens(const MoeTokens& m) override {
    TracedLayer& layer = trace_.layers[m.layer];
    const int64_t n = m.num_tokens;
    Append(layer.residual, m.residual, n * m.hidden);
    Append(layer.router_logits, m.router_logits, n * m.num_experts);
    Append(layer.topk_ids, m.topk_ids, n * m.num_experts_per_tok);
    Append(layer.topk_weights, m.topk_weights, n * m.num_experts_per_tok);
    Append(layer.routed, m.routed, n * m.hidden);
    Append(layer.moe_out, m.output, n * m.hidden);
    if (m.expert_outputs != nullptr) {
      Append(layer.expert_outputs, m.expert_outputs, n * m.num_experts * m.hidden);
    }
  }

 private:
  template <class T>
  static void Append(std::vector<T>& to, const T* from, int64_t count) {
    to.insert(to.end(), from, from + count);
  }
  ForwardTrace& trace_;
  Watch watch_;
};

inline ForwardTrace RunForward(const Model& model, const TokenSet& tokens,
                               const ForwardOptions& options = {}) {
  ForwardTrace trace;
  ThreadPool pool(options.threads);
  const JobControl control;
  const int64_t n = tokens.num_tokens(), h = model.config().hidden_size;
  LayerReader reader(model, {.prefetch = options.prefetch, .kept_experts = options.kept_experts});
  LayerSweep sweep(model, tokens, pool, control, "test");
  int64_t tile = 0;
  for (const SequenceTile& each : sweep.tiles()) tile = std::max(tile, each.num_tokens);
  HiddenStates states =
      options.spill.empty() ? HiddenStates(n, h) : HiddenStates(n, h, tile, options.spill);
  TraceObserver observer(trace, options.watch);
  sweep.Embed(states);
  for (int64_t layer = 0; layer < model.config().num_layers(); ++layer) {
    sweep.RunLayer(layer, reader.Get(layer), states,
                   options.watch == Watch::kNobody ? nullptr : &observer);
  }
  for (const SequenceTile& each : sweep.tiles()) {
    const float* rows = states.Load(each.first_token, each.num_tokens);
    trace.hidden.insert(trace.hidden.end(), rows, rows + each.num_tokens * h);
  }
  if (options.logits) {
    trace.logits.resize(static_cast<size_t>(n * model.config().vocab_size));
    ComputeLogits(model, pool, trace.hidden.data(), n, trace.logits.data());
  }
  return trace;
}

// Rows of equal length, as the reference files hold them.
inline TokenSet TokensOf(const std::vector<int32_t>& ids, int64_t num_sequences) {
  TokenSet tokens;
  const auto length = ids.size() / static_cast<size_t>(num_sequences);
  for (size_t i = 0; i < static_cast<size_t>(num_sequences); ++i) {
    tokens.Append(std::span(ids).subspan(i * length, length));
  }
  return tokens;
}

inline TokenSet GoldenTokens(const std::string& name) {
  const SafetensorsFile values = GoldenValues(name);
  return TokensOf(ReadIntegers(values, "input_ids"),
                  static_cast<int64_t>(values.Get("input_ids").shape[0]));
}

}  // namespace winnow
