#include "condense/condense_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>

#include "base/error.h"
#include "condense/neuron_pass.h"
#include "condense/routing_sums.h"
#include "forward/layer_sweep.h"
#include "kernels/elementwise.h"
#include "kernels/targets.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr const char* kProgressName = "progress.json";

TokenSet JoinSources(const std::vector<SourceBlocks>& sources, const ModelConfig& config) {
  TokenSet tokens;
  for (const SourceBlocks& source : sources) {
    tokens.AppendAll(source.sequences.ids, source.sequences.offsets);
  }
  CheckTokenIds(tokens.ids, config);
  return tokens;
}

std::vector<std::string> NamesOf(const std::vector<SourceBlocks>& sources) {
  std::vector<std::string> names;
  for (const SourceBlocks& source : sources) names.push_back(source.name);
  return names;
}

// What the search starts from: the stream before the block plus the shared expert, and what the
// experts see.
class SearchCapture : public MoeObserver {
 public:
  SearchCapture(float* base, float* input, RoutingSums* alpha)
      : base_(base), input_(input), alpha_(alpha) {}
  void OnTokens(const MoeTokens& m) override {
    const int64_t at = m.first_token * m.hidden, count = m.num_tokens * m.hidden;
    for (int64_t i = 0; i < count; ++i) {
      base_[at + i] = m.residual[i] + (m.output[i] - m.routed[i]);
    }
    std::memcpy(input_ + at, m.input, static_cast<size_t>(count) * sizeof(float));
    if (alpha_ != nullptr) alpha_->OnTokens(m);
  }

 private:
  float* base_;
  float* input_;
  RoutingSums* alpha_;
};

class Condenser {
 public:
  Condenser(const Model& model, const CondenseOptions& options, const CondensePlan& plan,
            const fs::path& folder, ThreadPool& pool, const JobControl& control)
      : model_(model),
        options_(options),
        plan_(plan),
        folder_(folder),
        pool_(pool),
        control_(control),
        reader_(model, {.prefetch = plan.prefetch}),
        search_(model, plan.search, pool, control, "observe", options.compute),
        alpha_(model, plan.alpha, pool, control, "observe", options.compute),
        stats_(plan.stats) {
    stats_.layers.clear();
    search_stream_ = MakeStream(plan.search, "search");
    if (two_texts()) alpha_stream_ = MakeStream(plan.alpha, "alpha");
  }

  CondenseStats Run() {
    const int64_t num_layers = model_.config().num_layers();
    const int64_t start = LoadProgress();
    if (start == 0) {
      search_.Embed(*search_stream_);
      if (two_texts()) alpha_.Embed(*alpha_stream_);
    } else {
      search_stream_->LoadFrom(StreamPath("search", start));
      if (two_texts()) alpha_stream_->LoadFrom(StreamPath("alpha", start));
    }
    const int64_t total = plan_.search.num_tokens() + plan_.alpha.num_tokens();
    auto last_save = std::chrono::steady_clock::now();
    for (int64_t layer = start; layer < num_layers; ++layer) {
      const LayerWeights& weights = reader_.Get(layer);
      search_.SetWork(layer * total + plan_.alpha.num_tokens(), num_layers * total);
      alpha_.SetWork(layer * total, num_layers * total);
      if (weights.router.empty()) {
        if (two_texts()) alpha_.RunLayer(layer, weights, *alpha_stream_, nullptr);
        search_.RunLayer(layer, weights, *search_stream_, nullptr);
      } else {
        stats_.layers.push_back(RunMoeLayer(layer, weights));
      }
      const auto now = std::chrono::steady_clock::now();
      if (layer + 1 < num_layers &&
          std::chrono::duration<double>(now - last_save).count() >= options_.checkpoint_seconds) {
        SaveProgress(layer + 1);
        last_save = std::chrono::steady_clock::now();
      }
    }
    return std::move(stats_);
  }

 private:
  bool two_texts() const { return plan_.alpha.num_tokens() > 0; }
  fs::path StreamPath(const char* name, int64_t layer) const {
    return folder_ / fmt::format("{}-{:04d}.f32", name, layer);
  }
  std::unique_ptr<HiddenStates> MakeStream(const TokenSet& tokens, const char* name) const {
    return winnow::MakeStream(
        tokens, model_.config().hidden_size,
        plan_.spill_streams ? folder_ / fmt::format("{}.spill", name) : fs::path());
  }

  CondenseLayer RunMoeLayer(int64_t layer, const LayerWeights& weights) {
    if (options_.method == CondenseMethod::kNeurons) {
      CondenseLayer result =
          ChooseLayerNeurons(model_, layer, weights,
                             {.width = options_.max_experts, .most_neurons = options_.most_neurons},
                             search_, *search_stream_, pool_, control_);
      result.moe_layer = static_cast<int32_t>(stats_.layers.size());
      return result;
    }
    const ModelConfig& config = model_.config();
    const int64_t h = config.hidden_size, tokens = plan_.search.num_tokens();
    const bool last = layer + 1 == config.num_layers();
    const int64_t experts = weights.num_experts();
    RoutingSums alpha(experts);
    if (two_texts()) alpha_.RunLayer(layer, weights, *alpha_stream_, &alpha);
    AlignedBuffer<float> base(static_cast<size_t>(tokens * h));
    AlignedBuffer<float> probabilities(static_cast<size_t>(tokens * h));
    ExpertOutputs outputs(experts, tokens, h,
                          plan_.spill_outputs ? folder_ / "outputs.spill" : fs::path());
    std::vector<float> norm;
    if (last) norm = LoadVector(model_, model_.final_norm());
    {
      AlignedBuffer<float> input(static_cast<size_t>(tokens * h));
      SearchCapture capture(base.data(), input.data(), two_texts() ? nullptr : &alpha);
      search_.RunLayer(layer, weights, *search_stream_, &capture);
      for (int64_t e = 0; e < experts; ++e) {
        for (const SequenceTile& tile : search_.tiles()) {
          float* rows = outputs.Rows(e, tile.first_token, tile.num_tokens);
          search_.RunExpert(weights.experts[static_cast<size_t>(e)],
                            input.data() + tile.first_token * h, tile.num_tokens, rows);
          outputs.Store(e, tile.first_token, tile.num_tokens);
        }
      }
    }
    // Published: the last layer's state is what the final norm makes of it.
    for (const SequenceTile& tile : search_.tiles()) {
      const float* intact = search_stream_->Load(tile.first_token, tile.num_tokens);
      constexpr int64_t kRows = 64;
      pool_.Run((tile.num_tokens + kRows - 1) / kRows, [&](int64_t task, int) {
        const int64_t first = task * kRows, rows = std::min(kRows, tile.num_tokens - first);
        float* p = probabilities.data() + (tile.first_token + first) * h;
        if (last) {
          RmsNorm(intact + first * h, rows, h, h, norm.data(), config.rms_norm_eps, p, h);
        } else {
          std::memcpy(p, intact + first * h, static_cast<size_t>(rows * h) * sizeof(float));
        }
        Softmax(p, rows, h, h);
      });
    }
    CondenseLayer result;
    result.layer = static_cast<int32_t>(layer);
    result.moe_layer = static_cast<int32_t>(stats_.layers.size());
    result.num_experts = experts;
    result.alpha_sum = std::move(alpha.weight);
    result.alpha_count = std::move(alpha.tokens);
    std::vector<double> alphas;
    for (int32_t e = 0; e < experts; ++e) alphas.push_back(result.AlphaOrDefault(e));
    result.steps = SearchExperts({.hidden = h,
                                  .offsets = plan_.search.offsets,
                                  .probabilities = probabilities.span(),
                                  .base = base.span(),
                                  .outputs = outputs,
                                  .alphas = alphas,
                                  .norm_weight = last ? norm.data() : nullptr,
                                  .norm_eps = config.rms_norm_eps,
                                  .max_experts = options_.max_experts},
                                 pool_, control_);
    return result;
  }

  // The layers so far, and how many decoder layers the saved streams have gone through.
  int64_t LoadProgress() {
    const fs::path path = folder_ / kProgressName;
    if (!options_.resume || !fs::exists(path)) return 0;
    const Json json = ParseJson(ReadTextFile(path), path.string());
    if (!json.is_object() || !json.contains("stats") || !json.contains("stream_layer") ||
        !json["stream_layer"].is_number_integer()) {
      throw ModelError(fmt::format("{}: not a record of progress", path.string()),
                       "start again with --force");
    }
    CondenseStats done = CondenseStatsFromJson(json["stats"], path.string());
    std::vector<CondenseLayer> layers = std::move(done.layers);
    done.layers.clear();
    if (CondenseStatsToJson(done) != CondenseStatsToJson(stats_)) {
      throw UsageError(
          fmt::format("{} was made with another model, text or flag", folder_.string()),
          "repeat the command as it was, or start again with --force");
    }
    const auto layer = json["stream_layer"].get<int64_t>();
    if (layer < 1 || layer >= model_.config().num_layers()) {
      throw ModelError(fmt::format("{}: implausible layer numbers", path.string()),
                       "start again with --force");
    }
    stats_.layers = std::move(layers);
    return layer;
  }

  void SaveProgress(int64_t layer) {
    search_stream_->SaveTo(StreamPath("search", layer));
    if (two_texts()) alpha_stream_->SaveTo(StreamPath("alpha", layer));
    const OrderedJson json = {{"stats", CondenseStatsToJson(stats_)}, {"stream_layer", layer}};
    WriteFileAtomically(folder_ / kProgressName, json.dump());
    if (saved_ > 0) {
      fs::remove(StreamPath("search", saved_));
      fs::remove(StreamPath("alpha", saved_));
    }
    saved_ = layer;
  }

  const Model& model_;
  const CondenseOptions& options_;
  const CondensePlan& plan_;
  fs::path folder_;
  ThreadPool& pool_;
  const JobControl& control_;
  LayerReader reader_;
  LayerSweep search_, alpha_;
  std::unique_ptr<HiddenStates> search_stream_, alpha_stream_;
  CondenseStats stats_;
  int64_t saved_ = 0;
};

MemoryPlan MakeMemoryPlan(const Model& model, const CondensePlan& plan,
                          const CondenseOptions& options, int num_threads) {
  const int64_t h = model.config().hidden_size;
  const int64_t search = plan.search.num_tokens(), alpha = plan.alpha.num_tokens();
  int64_t experts = 0;
  for (const LayerConfig& layer : model.config().layers) {
    if (layer.is_moe) experts = std::max(experts, layer.num_experts);
  }
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  const LayerReaderOptions reading{.prefetch = plan.prefetch};
  memory.Add(plan.prefetch ? "weights of two layers" : "weights of one layer",
             LayerReader::LargestLayerBytes(model, reading) * (plan.prefetch ? 2 : 1));
  const int64_t tile = std::max(LargestTile(plan.search), LargestTile(plan.alpha));
  memory.Add(plan.spill_streams ? "hidden states, one tile (the rest on disk)"
                                : "hidden states of all tokens",
             plan.spill_streams ? 2 * HiddenStates::Bytes(tile, h)
                                : HiddenStates::Bytes(search + alpha, h));
  if (options.method == CondenseMethod::kNeurons) {
    const NeuronWidth width{options.max_experts, options.most_neurons};
    uint64_t largest = 0;
    for (const LayerConfig& layer : model.config().layers) {
      if (layer.is_moe) {
        largest = std::max(largest, NeuronPassBytes(model.config(), layer, width, tile));
      }
    }
    memory.Add("moments of a layer's neurons", largest);
    memory.Add("token ids", static_cast<uint64_t>(search) * 8);
    memory.Add("work of a tile", LayerSweep::ScratchBytes(model, plan.search, true, num_threads));
    return memory;
  }
  memory.Add("search text: sums, inputs, intact states", 3 * HiddenStates::Bytes(search, h));
  memory.Add(plan.spill_outputs ? "outputs of an expert, one tile (the rest on disk)"
                                : "outputs of all experts of a layer",
             plan.spill_outputs
                 ? HiddenStates::Bytes(std::max(tile, std::min(search, kSearchChunkTokens)), h)
                 : ExpertOutputs::Bytes(experts, search, h));
  memory.Add("divergences", ExpertSearchBytes(search, experts, h, num_threads));
  memory.Add("token ids", static_cast<uint64_t>(search + alpha) * 8);
  memory.Add("work of a tile",
             LayerSweep::ScratchBytes(model, plan.search, false, num_threads) +
                 (alpha > 0 ? LayerSweep::ScratchBytes(model, plan.alpha, false, num_threads) : 0));
  return memory;
}

}  // namespace

CondensePlan PlanCondense(const Model& model, const std::vector<SourceBlocks>& search,
                          const std::vector<SourceBlocks>& alpha, const CondenseOptions& options,
                          int num_threads) {
  const ModelConfig& config = model.config();
  if (config.MoeLayers().empty()) {
    throw UsageError("the model has no Mixture-of-Experts layers", "there is nothing to condense");
  }
  if (config.has_packed_experts()) {
    throw UsageError("the model's experts are packed, and condensing takes them apart",
                     "condense the original model, quantise last");
  }
  for (const int32_t layer : config.MoeLayers()) {
    const int64_t experts = config.layers[static_cast<size_t>(layer)].num_experts;
    if (options.method == CondenseMethod::kNeurons && options.max_experts == 0 &&
        config.layers[static_cast<size_t>(layer)].shared_width == 0) {
      throw UsageError("--width 0 keeps the shared expert alone, and this model has none",
                       "keep at least one expert's worth");
    }
    if (options.max_experts > experts) {
      throw UsageError(
          fmt::format("{} experts asked for: layer {} has {}", options.max_experts, layer, experts),
          "ask for fewer");
    }
  }
  CondensePlan plan;
  plan.search = JoinSources(search, config);
  plan.alpha = JoinSources(alpha, config);
  if (plan.search.num_tokens() == 0) throw UsageError("there are no calibration tokens");
  CondenseStats& stats = plan.stats;
  stats.model_fingerprint = model.checkpoint().FingerprintHex();
  stats.model_type = std::string(config.family->model_type);
  stats.num_layers = config.num_layers();
  stats.method = options.method == CondenseMethod::kNeurons ? "condense" : "cd-moe";
  stats.compute = options.compute == ComputePrecision::kF32 ? "f32" : "auto";
  stats.isa = ActiveIsa();
  stats.max_experts = options.max_experts;
  stats.most_neurons = options.method == CondenseMethod::kNeurons ? options.most_neurons : 0;
  stats.search_sources = NamesOf(search);
  stats.search_fingerprint = FingerprintOf(plan.search);
  stats.search_tokens = plan.search.num_tokens();
  const bool both = plan.alpha.num_tokens() == 0;
  stats.alpha_sources = both ? stats.search_sources : NamesOf(alpha);
  stats.alpha_fingerprint = both ? stats.search_fingerprint : FingerprintOf(plan.alpha);
  stats.alpha_tokens = both ? stats.search_tokens : plan.alpha.num_tokens();
  int64_t experts = 0;
  for (const LayerConfig& layer : config.layers) {
    if (layer.is_moe) experts = std::max(experts, layer.num_experts);
  }
  struct Way {
    bool prefetch, spill_streams, spill_outputs;
  };
  for (const Way& way : {Way{true, false, false}, Way{false, false, false}, Way{true, false, true},
                         Way{false, false, true}, Way{true, true, true}, Way{false, true, true}}) {
    if (way.spill_outputs && options.method == CondenseMethod::kNeurons && !way.spill_streams) {
      continue;  // it keeps no outputs
    }
    plan.prefetch = way.prefetch;
    plan.spill_streams = way.spill_streams;
    plan.spill_outputs = way.spill_outputs;
    plan.memory = MakeMemoryPlan(model, plan, options, num_threads);
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) break;
  }
  plan.memory.Require(options.memory_budget_bytes);
  const uint64_t streams =
      HiddenStates::Bytes(plan.search.num_tokens() + plan.alpha.num_tokens(), config.hidden_size);
  plan.disk_bytes = streams * (plan.spill_streams ? 3 : 2);
  if (plan.spill_outputs && options.method == CondenseMethod::kExperts) {
    plan.disk_bytes += ExpertOutputs::Bytes(experts, plan.search.num_tokens(), config.hidden_size);
  }
  return plan;
}

CondenseStats RunCondense(const Model& model, const CondenseOptions& options,
                          const CondensePlan& plan, const fs::path& output, ThreadPool& pool,
                          const JobControl& control) {
  const fs::path folder = output.string() + ".partial";
  if (!options.resume) fs::remove_all(folder);
  fs::create_directories(folder);
  RequireDiskSpace(output, plan.disk_bytes, "the search");
  CondenseStats stats = Condenser(model, options, plan, folder, pool, control).Run();
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".f32" || extension == ".spill" || extension == ".tmp" ||
        entry.path().filename() == kProgressName) {
      fs::remove(entry.path());
    }
  }
  WriteSearchTokens(folder, plan.search);
  WriteFileAtomically(folder / "stats.json", CondenseStatsToJson(stats).dump(1) + "\n");
  fs::remove_all(output);
  RenameDurably(folder, output);
  return stats;
}

}  // namespace winnow
