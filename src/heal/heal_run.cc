#include "heal/heal_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "base/error.h"
#include "base/hash.h"
#include "base/json.h"
#include "checkpoint/safetensors_file.h"
#include "checkpoint/safetensors_writer.h"
#include "forward/layer_sweep.h"
#include "heal/ridge_refit.h"
#include "weights/fused_feed_forward.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

// Of every so many sequences of a source, which one judges and which choose lambda.
constexpr int64_t kConfirmEvery = 10, kConfirmAt = 4;
constexpr int64_t kHeldOutEvery = 5, kHeldOutAt = 2;
constexpr const char* kProgressName = "heal.json";

void SplitSequences(const std::vector<SourceBlocks>& sources, HealPlan& plan) {
  TokenSequences confirm;
  confirm.offsets.push_back(0);
  for (const SourceBlocks& source : sources) {
    const TokenSequences& all = source.sequences;
    for (int64_t i = 0; i < all.size(); ++i) {
      const int64_t begin = all.offsets[static_cast<size_t>(i)];
      const int64_t end = all.offsets[static_cast<size_t>(i) + 1];
      if (end - begin < 1) continue;
      const std::span<const int32_t> ids =
          std::span(all.ids).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
      if (i % kConfirmEvery == kConfirmAt && ids.size() > 1) {
        confirm.ids.insert(confirm.ids.end(), ids.begin(), ids.end());
        confirm.offsets.push_back(static_cast<int64_t>(confirm.ids.size()));
        continue;
      }
      plan.fit.Append(ids);
      plan.held_out.insert(plan.held_out.end(), ids.size(),
                           i % kHeldOutEvery == kHeldOutAt ? 1 : 0);
    }
  }
  if (confirm.ids.empty()) {
    throw UsageError(
        fmt::format("healing needs {} sequences of some text, one of them to judge it by",
                    kConfirmAt + 1),
        "ask for more blocks (--blocks), or leave healing out");
  }
  plan.confirm = WindowsOfIds(confirm);
}

const std::vector<int32_t>& KeptOf(const HealOptions& options, int64_t layer) {
  static const std::vector<int32_t> kNone;
  const auto at = static_cast<size_t>(layer);
  return at < options.kept_experts.size() ? options.kept_experts[at] : kNone;
}

// Widths of what a layer refits: its survivors and the shared expert.
std::vector<int64_t> RefitWidths(const LayerConfig& layer, size_t kept) {
  std::vector<int64_t> widths(kept, layer.expert_width);
  if (layer.shared_width > 0) widths.push_back(layer.shared_width);
  return widths;
}

// Collects what the refit needs while a layer runs on the healed stream.
class Capture : public MoeObserver {
 public:
  Capture(int64_t num_tokens, int64_t hidden, ActivationStore& store)
      : hidden_(hidden),
        store_(store),
        residual_(static_cast<size_t>(num_tokens * hidden)),
        weight_(static_cast<size_t>(num_tokens)) {}

  // The intact stream after the layer, of tokens from `first_token` on.
  void SetTarget(const float* target, int64_t first_token) {
    target_ = target;
    target_first_ = first_token;
  }
  bool WantsExpertRows() const override { return true; }
  void OnExpertRows(const ExpertRows& rows) override { store_.Append(rows); }
  void OnTokens(const MoeTokens& m) override {
    for (int64_t t = 0; t < m.num_tokens; ++t) {
      const float* target = target_ + (m.first_token - target_first_ + t) * hidden_;
      const float* before = m.residual + t * hidden_;
      const float* output = m.output + t * hidden_;
      float* left = residual_.data() + (m.first_token + t) * hidden_;
      double norm = 0;
      for (int64_t i = 0; i < hidden_; ++i) {
        left[i] = (target[i] - before[i]) - output[i];
        norm += static_cast<double>(target[i]) * static_cast<double>(target[i]);
      }
      weight_[static_cast<size_t>(m.first_token + t)] =
          norm > 0 ? static_cast<float>(1 / norm) : 0.0f;
    }
  }
  std::span<const float> residual() const { return residual_.span(); }
  std::span<const float> weight() const { return weight_; }

 private:
  int64_t hidden_;
  ActivationStore& store_;
  const float* target_ = nullptr;
  int64_t target_first_ = 0;
  AlignedBuffer<float> residual_;  // [T, hidden]
  std::vector<float> weight_;      // [T]
};

// W + change in W's format.
AlignedBuffer<std::byte> Changed(const WeightMatrix& w, const AlignedBuffer<float>& change,
                                 ThreadPool& pool) {
  AlignedBuffer<std::byte> result(static_cast<size_t>(w.bytes()));
  pool.Run(w.rows, [&](int64_t r, int) {
    for (int64_t c = 0; c < w.cols; ++c) {
      const auto at = static_cast<size_t>(r * w.cols + c);
      const float value =
          LoadAsFloat(w.dtype, w.data, static_cast<size_t>(r * w.stride() + c)) + change[at];
      StoreFloat(w.dtype, value, result.data(), at);
    }
  });
  return result;
}

// New down projections of a layer, by expert of the original model (-1: shared).
struct HealedWeights {
  std::vector<int32_t> experts;
  std::vector<AlignedBuffer<std::byte>> down;
};

class Healer {
 public:
  Healer(const Model& model, const HealOptions& options, const HealPlan& plan,
         const fs::path& folder, ThreadPool& pool, const JobControl& control)
      : model_(model),
        options_(options),
        plan_(plan),
        folder_(folder),
        pool_(pool),
        control_(control),
        reader_(model, {.prefetch = plan.prefetch}),
        fit_(model, plan.fit, pool, control, "heal", options.compute),
        judge_control_{{}, {}, control.interrupted},
        judge_(model, plan.confirm.inputs, pool, judge_control_, "heal", options.compute) {}

  HealResult Run() {
    const int64_t num_layers = model_.config().num_layers();
    LoadProgress();
    MakeStreams();
    fit_.SetWork(0, 2 * num_layers * plan_.fit.num_tokens());
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const LayerWeights& weights = reader_.Get(layer);
      if (weights.router.empty()) {
        fit_.RunLayer(layer, weights, *intact_, nullptr);
        fit_.RunLayer(layer, weights, *healed_, nullptr);
        Judge(layer, weights, weights, weights);
      } else {
        HealLayer(layer, weights);
      }
    }
    result_.intact = ScoreStates(model_, plan_.confirm, *judge_intact_, pool_, control_);
    result_.pruned = ScoreStates(model_, plan_.confirm, *judge_pruned_, pool_, control_);
    result_.healed = ScoreStates(model_, plan_.confirm, *judge_healed_, pool_, control_);
    return std::move(result_);
  }

 private:
  std::unique_ptr<HiddenStates> MakeStream(const TokenSet& tokens, const char* name) const {
    return winnow::MakeStream(tokens, model_.config().hidden_size,
                              plan_.spill ? folder_ / fmt::format("{}.spill", name) : fs::path());
  }

  void MakeStreams() {
    intact_ = MakeStream(plan_.fit, "intact");
    healed_ = MakeStream(plan_.fit, "healed");
    fit_.Embed(*intact_);
    fit_.Embed(*healed_);
    for (auto* stream : {&judge_intact_, &judge_pruned_, &judge_healed_}) {
      *stream = MakeStream(plan_.confirm.inputs, "judge");
      judge_.Embed(**stream);
    }
  }

  // The streams that only judge, one layer on.
  void Judge(int64_t layer, const LayerWeights& intact, const LayerWeights& pruned,
             const LayerWeights& healed) {
    judge_.RunLayer(layer, intact, *judge_intact_, nullptr);
    judge_.RunLayer(layer, pruned, *judge_pruned_, nullptr);
    judge_.RunLayer(layer, healed, *judge_healed_, nullptr);
  }

  void HealLayer(int64_t layer, const LayerWeights& weights) {
    std::vector<int32_t> kept = KeptOf(options_, layer);
    const auto parts = options_.condensed.find(static_cast<int32_t>(layer));
    const bool condensed = parts != options_.condensed.end();
    if (condensed) {
      kept.clear();
    } else if (kept.empty()) {
      for (int32_t e = 0; e < weights.num_experts(); ++e) kept.push_back(e);
    }
    AlignedBuffer<std::byte> router_rows;
    FusedFeedForward fused;
    const LayerWeights pruned = condensed ? FusedLayer(weights, parts->second, fused)
                                          : weights.WithExperts(kept, router_rows);
    HealedWeights changed;
    if (const Json* done = DoneLayer(layer)) {
      AdvanceIntactAndAttention(layer, weights, nullptr);
      changed = ReadHealed(layer, pruned, kept);
      result_.layers.push_back(FromJson(*done, layer));
    } else {
      changed = Refit(layer, weights, pruned, kept);
    }
    LayerWeights healed = pruned;
    for (size_t i = 0; i < changed.experts.size(); ++i) {
      const int32_t expert = changed.experts[i];
      if (expert == kDensePart) {
        healed.dense.down = View(healed.dense.down, changed.down[i]);
        continue;
      }
      if (expert == kSharedPart) {
        healed.shared.down = View(healed.shared.down, changed.down[i]);
        continue;
      }
      const auto at = std::lower_bound(kept.begin(), kept.end(), expert) - kept.begin();
      WeightMatrix& down = healed.experts[static_cast<size_t>(at)].down;
      down = View(down, changed.down[i]);
    }
    for (const SequenceTile& tile : fit_.tiles()) {
      float* hidden = healed_->Load(tile.first_token, tile.num_tokens);
      fit_.RunFeedForward(healed, {.layer = layer, .first_token = tile.first_token},
                          tile.num_tokens, hidden);
      healed_->Store(tile.first_token, tile.num_tokens);
      fit_.Advance(layer, tile.num_tokens);
    }
    Judge(layer, weights, pruned, healed);
  }

  static WeightMatrix View(const WeightMatrix& old, const AlignedBuffer<std::byte>& bytes) {
    return {bytes.data(), old.rows, old.cols, old.dtype};
  }

  // Both streams through attention, the intact one through its experts too; `capture` sees what the
  // pruned layer does on the healed stream.
  void AdvanceIntactAndAttention(int64_t layer, const LayerWeights& weights, Capture* capture,
                                 const LayerWeights* pruned = nullptr) {
    for (const SequenceTile& tile : fit_.tiles()) {
      const int64_t n = tile.num_tokens;
      float* intact = intact_->Load(tile.first_token, n);
      fit_.RunAttention(weights, tile, intact);
      fit_.RunFeedForward(weights, {.layer = layer, .first_token = tile.first_token}, n, intact);
      intact_->Store(tile.first_token, n);
      float* hidden = healed_->Load(tile.first_token, n);
      fit_.RunAttention(weights, tile, hidden);
      if (capture != nullptr) {
        capture->SetTarget(intact, tile.first_token);
        fit_.RunFeedForward(*pruned,
                            {.layer = layer,
                             .first_token = tile.first_token,
                             .observer = capture,
                             .add_to_residual = false},
                            n, hidden);
      }
      healed_->Store(tile.first_token, n);
      fit_.Advance(layer, n);
    }
  }

  HealedWeights Refit(int64_t layer, const LayerWeights& weights, const LayerWeights& pruned,
                      const std::vector<int32_t>& kept) {
    ActivationStore store =
        plan_.spill ? ActivationStore(folder_ / "activations.spill") : ActivationStore();
    Capture capture(plan_.fit.num_tokens(), model_.config().hidden_size, store);
    AdvanceIntactAndAttention(layer, weights, &capture, &pruned);
    LayerRefit refit = RefitDownProjections({.activations = store,
                                             .hidden = model_.config().hidden_size,
                                             .residual = capture.residual(),
                                             .weight = capture.weight(),
                                             .held_out = plan_.held_out},
                                            {.cache_bytes = plan_.cache_bytes}, pool_, control_);
    double held_out_tokens = 0;
    for (const uint8_t held : plan_.held_out) held_out_tokens += held;
    HealedLayer report;
    report.layer = static_cast<int32_t>(layer);
    report.lambda = refit.lambda;
    report.error_before = std::sqrt(refit.held_out_before / held_out_tokens);
    report.error_after = std::sqrt(refit.held_out_after / held_out_tokens);
    report.skipped_experts = refit.skipped_experts;
    HealedWeights changed;
    for (RefitStep& step : refit.steps) {
      const WeightMatrix& down = step.expert >= 0
                                     ? pruned.experts[static_cast<size_t>(step.expert)].down
                                     : DownOf(pruned, step.expert);
      changed.experts.push_back(step.expert >= 0 ? kept[static_cast<size_t>(step.expert)]
                                                 : step.expert);
      changed.down.push_back(Changed(down, step.change, pool_));
      step.change = AlignedBuffer<float>();
    }
    WriteHealed(layer, pruned, changed);
    result_.layers.push_back(report);
    SaveProgress();
    return changed;
  }

  static const WeightMatrix& DownOf(const LayerWeights& layer, int32_t expert) {
    if (expert == kDensePart) return layer.dense.down;
    return expert == kSharedPart ? layer.shared.down : layer.experts.front().down;
  }

  void WriteHealed(int64_t layer, const LayerWeights& pruned, const HealedWeights& changed) const {
    if (changed.experts.empty()) return;
    std::vector<TensorData> tensors;
    for (size_t i = 0; i < changed.experts.size(); ++i) {
      const WeightMatrix& down = DownOf(pruned, changed.experts[i]);
      tensors.push_back({HealedTensorName(changed.experts[i]),
                         down.dtype,
                         {static_cast<uint64_t>(down.rows), static_cast<uint64_t>(down.cols)},
                         changed.down[i].span()});
    }
    WriteSafetensors(HealedLayerPath(folder_, layer), tensors);
  }

  HealedWeights ReadHealed(int64_t layer, const LayerWeights& pruned,
                           const std::vector<int32_t>& kept) const {
    HealedWeights changed;
    const fs::path path = HealedLayerPath(folder_, layer);
    if (!fs::exists(path)) return changed;
    const SafetensorsFile file = SafetensorsFile::Open(path);
    std::vector<int32_t> experts = kept;
    experts.push_back(kSharedPart);
    experts.push_back(kDensePart);
    for (const int32_t expert : experts) {
      const TensorInfo* tensor = file.Find(HealedTensorName(expert));
      if (tensor == nullptr) continue;
      const WeightMatrix& down = DownOf(pruned, expert);
      if (down.empty() || tensor->dtype != down.dtype || tensor->bytes != down.bytes()) {
        throw ModelError(fmt::format("{}: {} is {}, which is not of this model", path.string(),
                                     tensor->name, tensor->Describe()),
                         "start again with --force");
      }
      changed.experts.push_back(expert);
      changed.down.emplace_back(static_cast<size_t>(tensor->bytes));
      file.Read(*tensor, changed.down.back().span());
    }
    return changed;
  }

  // heal.json: which run this is and which layers are done.
  std::string RunFingerprint() const {
    Fingerprint fingerprint;
    fingerprint.Add(model_.checkpoint().FingerprintHex());
    fingerprint.Add(std::as_bytes(std::span(plan_.fit.ids)));
    fingerprint.Add(std::as_bytes(std::span(plan_.fit.offsets)));
    fingerprint.Add(std::as_bytes(std::span(plan_.held_out)));
    fingerprint.Add(std::as_bytes(std::span(plan_.confirm.inputs.ids)));
    for (const std::vector<int32_t>& kept : options_.kept_experts) {
      fingerprint.Add(std::as_bytes(std::span(kept)));
      fingerprint.Add(uint64_t{kept.size()});
    }
    for (const auto& [layer, parts] : options_.condensed) {
      fingerprint.Add(static_cast<uint64_t>(layer));
      for (const FusedPart& part : parts) {
        fingerprint.Add(fmt::format("{} {:a}", part.expert, part.alpha));
        fingerprint.Add(std::as_bytes(std::span(part.neurons)));
      }
    }
    fingerprint.Add(options_.compute == ComputePrecision::kF32 ? "f32" : "auto");
    return fingerprint.Hex();
  }

  void LoadProgress() {
    const fs::path path = folder_ / kProgressName;
    if (!options_.resume || !fs::exists(path)) return;
    progress_ = ParseJson(ReadTextFile(path), path.string());
    if (!progress_.is_object() || progress_.value("fingerprint", "") != RunFingerprint()) {
      throw UsageError(
          fmt::format("{} was made with another model, plan, text or flag", folder_.string()),
          "repeat the command as it was, or start again with --force");
    }
  }

  const Json* DoneLayer(int64_t layer) const {
    if (!progress_.is_object() || !progress_.contains("layers")) return nullptr;
    for (const Json& done : progress_["layers"]) {
      if (done.is_object() && done.value("layer", int64_t{-1}) == layer) return &done;
    }
    return nullptr;
  }

  static HealedLayer FromJson(const Json& json, int64_t layer) {
    return {.layer = static_cast<int32_t>(layer),
            .lambda = json.value("lambda", 0.0),
            .error_before = json.value("error_before", 0.0),
            .error_after = json.value("error_after", 0.0),
            .skipped_experts = json.value("skipped_experts", int64_t{0})};
  }

  void SaveProgress() const {
    OrderedJson layers = OrderedJson::array();
    for (const HealedLayer& layer : result_.layers) {
      layers.push_back({{"layer", layer.layer},
                        {"lambda", layer.lambda},
                        {"error_before", layer.error_before},
                        {"error_after", layer.error_after},
                        {"skipped_experts", layer.skipped_experts}});
    }
    const OrderedJson json = {{"fingerprint", RunFingerprint()}, {"layers", layers}};
    WriteFileAtomically(folder_ / kProgressName, json.dump());
  }

  const Model& model_;
  const HealOptions& options_;
  const HealPlan& plan_;
  fs::path folder_;
  ThreadPool& pool_;
  const JobControl& control_;
  LayerReader reader_;
  LayerSweep fit_;
  const JobControl judge_control_;  // its progress is not shown
  LayerSweep judge_;
  std::unique_ptr<HiddenStates> intact_, healed_, judge_intact_, judge_pruned_, judge_healed_;
  Json progress_;
  HealResult result_;
};

}  // namespace

ScoredWindows JudgingSequences(const std::vector<SourceBlocks>& sources) {
  HealPlan plan;
  SplitSequences(sources, plan);
  return plan.confirm;
}

std::vector<SourceBlocks> FittingSequences(const std::vector<SourceBlocks>& sources) {
  std::vector<SourceBlocks> fitting;
  for (const SourceBlocks& source : sources) {
    const TokenSequences& all = source.sequences;
    SourceBlocks rest{.name = source.name, .sequences = {}};
    rest.sequences.offsets.push_back(0);
    for (int64_t i = 0; i < all.size(); ++i) {
      const auto begin = all.offsets[static_cast<size_t>(i)];
      const auto end = all.offsets[static_cast<size_t>(i) + 1];
      if (i % kConfirmEvery == kConfirmAt && end - begin > 1) continue;
      rest.sequences.ids.insert(rest.sequences.ids.end(), all.ids.begin() + begin,
                                all.ids.begin() + end);
      if (!all.weights.empty()) {
        rest.sequences.weights.insert(rest.sequences.weights.end(), all.weights.begin() + begin,
                                      all.weights.begin() + end);
      }
      rest.sequences.offsets.push_back(static_cast<int64_t>(rest.sequences.ids.size()));
    }
    fitting.push_back(std::move(rest));
  }
  return fitting;
}

HealPlan PlanHeal(const Model& model, const std::vector<SourceBlocks>& sources,
                  const HealOptions& options, int num_threads) {
  HealPlan plan;
  const ModelConfig& config = model.config();
  if (config.has_packed_experts()) {
    throw UsageError("the model's experts are packed, and healing fits new weights to them",
                     "heal the original model, quantise last");
  }
  SplitSequences(sources, plan);
  CheckTokenIds(plan.fit.ids, config);
  CheckTokenIds(plan.confirm.inputs.ids, config);
  const int64_t n = plan.fit.num_tokens(), h = config.hidden_size;
  uint64_t activations = 0, refit = 0, cache = 0, new_weights = 0;
  for (int64_t layer = 0; layer < config.num_layers(); ++layer) {
    const LayerConfig& c = config.layers[static_cast<size_t>(layer)];
    if (!c.is_moe) continue;
    const size_t kept = KeptOf(options, layer).size();
    std::vector<int64_t> widths =
        RefitWidths(c, kept == 0 ? static_cast<size_t>(c.num_experts) : kept);
    const auto parts = options.condensed.find(static_cast<int32_t>(layer));
    if (parts != options.condensed.end()) {
      const int64_t fused = FusedWidth(parts->second, c.expert_width, c.shared_width);
      widths = {fused};
      if (config.shared_expert_gated) widths.push_back(c.shared_width);
      activations = std::max(activations, static_cast<uint64_t>(n) * sizeof(float) *
                                              static_cast<uint64_t>(fused + c.shared_width));
    }
    uint64_t down_bytes = 0;
    for (const int64_t width : widths) {
      down_bytes += static_cast<uint64_t>(h) * static_cast<uint64_t>(width) * sizeof(float);
    }
    plan.bytes_to_write += down_bytes;  // an upper bound: f32
    new_weights = std::max(new_weights, down_bytes);
    refit = std::max(refit, RefitBytes(n, h, widths));
    cache = std::max(cache, RefitCacheBytes(widths));
    activations = std::max(
        activations,
        static_cast<uint64_t>(n) * sizeof(float) *
            static_cast<uint64_t>(config.num_experts_per_tok * c.expert_width + c.shared_width));
  }
  const int64_t tile = LargestTile(plan.fit);
  const int64_t judged = plan.confirm.inputs.num_tokens();
  for (const auto& [prefetch, spill] :
       {std::pair(true, false), std::pair(false, false), std::pair(false, true)}) {
    plan.prefetch = prefetch;
    plan.spill = spill;
    plan.memory = {};
    plan.memory.Add("program", kProgramBytes);
    const LayerReaderOptions reading{.prefetch = prefetch};
    plan.memory.Add(prefetch ? "weights of two layers" : "weights of one layer",
                    (prefetch ? 2 : 1) * LayerReader::LargestLayerBytes(model, reading));
    plan.memory.Add("new down projections", new_weights);
    plan.memory.Add(spill ? "streams, one tile (the rest on disk)" : "intact and healed stream",
                    2 * HiddenStates::Bytes(spill ? tile : n, h) +
                        3 * HiddenStates::Bytes(spill ? std::min(tile, judged) : judged, h));
    plan.memory.Add("inputs of the down projections", spill ? 0 : activations);
    plan.memory.Add("error to repair", HiddenStates::Bytes(n, h));
    plan.memory.Add("ridge regression", refit);
    plan.memory.Add("work of a tile",
                    2 * LayerSweep::ScratchBytes(model, plan.fit, false, num_threads));
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) {
      if (plan.memory.total_bytes() + cache <= options.memory_budget_bytes) {
        plan.cache_bytes = cache;
        plan.memory.Add("Gram matrices kept between sweeps", cache);
      }
      return plan;
    }
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

HealResult RunHeal(const Model& model, const HealOptions& options, const HealPlan& plan,
                   const fs::path& folder, ThreadPool& pool, const JobControl& control) {
  if (!options.resume) fs::remove_all(folder);
  RequireDiskSpace(folder, plan.bytes_to_write, "the healed weights");
  fs::create_directories(folder);
  return Healer(model, options, plan, folder, pool, control).Run();
}

fs::path HealedLayerPath(const fs::path& folder, int64_t layer) {
  return folder / fmt::format("healed-{:04d}.safetensors", layer);
}

std::string HealedTensorName(int32_t expert) {
  if (expert == kDensePart) return "condensed.down";
  return expert == kSharedPart ? "shared.down" : fmt::format("experts.{}.down", expert);
}

}  // namespace winnow
