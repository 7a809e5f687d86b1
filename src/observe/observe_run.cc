#include "observe/observe_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>

#include "base/checked_math.h"
#include "base/error.h"
#include "base/hash.h"
#include "base/units.h"
#include "forward/layer_sweep.h"
#include "kernels/targets.h"
#include "observe/stats_collector.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

TokenSet JoinSources(const std::vector<SourceBlocks>& sources) {
  TokenSet tokens;
  for (const SourceBlocks& source : sources) {
    tokens.AppendAll(source.sequences.ids, source.sequences.offsets);
  }
  if (tokens.num_tokens() == 0) throw UsageError("there are no calibration tokens");
  return tokens;
}

// What each token counts for, in the order of JoinSources; empty if no source has a mask.
std::vector<float> JoinWeights(const std::vector<SourceBlocks>& sources) {
  if (std::all_of(sources.begin(), sources.end(),
                  [](const SourceBlocks& source) { return source.sequences.weights.empty(); })) {
    return {};
  }
  std::vector<float> weights;
  for (const SourceBlocks& source : sources) {
    const std::vector<float>& own = source.sequences.weights;
    if (own.empty()) {
      weights.resize(weights.size() + source.sequences.ids.size(), 1.0f);
    } else {
      weights.insert(weights.end(), own.begin(), own.end());
    }
  }
  return weights;
}

StatsSource DescribeSource(const SourceBlocks& blocks) {
  StatsSource source;
  source.name = blocks.name;
  Fingerprint fingerprint;
  fingerprint.Add(std::as_bytes(std::span(blocks.sequences.ids)));
  fingerprint.Add(std::as_bytes(std::span(blocks.sequences.offsets)));
  fingerprint.Add(std::as_bytes(std::span(blocks.sequences.weights)));
  source.fingerprint = fingerprint.Hex();
  for (int64_t i = 0; i < blocks.sequences.size(); ++i) {
    const int64_t length = blocks.sequences.offsets[static_cast<size_t>(i) + 1] -
                           blocks.sequences.offsets[static_cast<size_t>(i)];
    if (length == 0) continue;
    ++source.num_sequences;
    source.num_tokens += length;
    if (!source.lengths.empty() && source.lengths.back().first == length) {
      ++source.lengths.back().second;
    } else {
      source.lengths.emplace_back(length, 1);
    }
  }
  return source;
}

double PassFlop(const ModelConfig& config, int64_t tokens, bool all_experts) {
  double per_token = 0;
  const auto h = static_cast<double>(config.hidden_size);
  for (const LayerConfig& layer : config.layers) {
    per_token += 2 * h * static_cast<double>(2 * config.query_width() + 2 * config.kv_width());
    per_token += 6 * h * static_cast<double>(layer.dense_width + layer.shared_width);
    if (!layer.is_moe) continue;
    const auto experts = static_cast<double>(layer.num_experts);
    const double used = all_experts ? experts : static_cast<double>(config.num_experts_per_tok);
    per_token += 6 * h * static_cast<double>(layer.expert_width) * used + 2 * h * experts;
    if (all_experts) per_token += h * experts * (experts + 1);
  }
  return per_token * static_cast<double>(tokens) * 1e-12;
}

// Where an interrupted run stands: OUT.partial/progress.json, replaced after each layer.
struct Progress {
  std::string fingerprint;   // of model, text and every flag that changes the result
  int64_t stats_layers = 0;  // decoder layers whose statistics are complete
  int64_t stream_layer =
      0;  // layers the saved stream has gone through; 0: start from the embedding
  std::vector<std::vector<int32_t>> survivors;  // progressive: chosen so far, by decoder layer
};

std::string RunFingerprint(const StatsInfo& info, const ObserveOptions& options) {
  Fingerprint fingerprint;
  fingerprint.Add(StatsInfoToJson(info).dump());
  for (const std::vector<int32_t>& kept : options.kept_experts) {
    fingerprint.Add(std::as_bytes(std::span(kept)));
    fingerprint.Add(uint64_t{kept.size()});
  }
  return fingerprint.Hex();
}

void SaveProgress(const fs::path& folder, const Progress& progress) {
  const OrderedJson json = {{"fingerprint", progress.fingerprint},
                            {"stats_layers", progress.stats_layers},
                            {"stream_layer", progress.stream_layer},
                            {"survivors", progress.survivors}};
  WriteFileAtomically(folder / "progress.json", json.dump());
}

Progress LoadProgress(const fs::path& folder, const std::string& fingerprint, int64_t num_layers) {
  const fs::path path = folder / "progress.json";
  Progress progress;
  progress.fingerprint = fingerprint;
  if (!fs::exists(path)) return progress;
  const Json json = ParseJson(ReadTextFile(path), path.string());
  try {
    if (json.at("fingerprint").get<std::string>() != fingerprint) {
      throw UsageError(fmt::format("{} was made with another model, text or flag", folder.string()),
                       "repeat the command as it was, or start again with --force");
    }
    progress.stats_layers = json.at("stats_layers").get<int64_t>();
    progress.stream_layer = json.at("stream_layer").get<int64_t>();
    progress.survivors = json.at("survivors").get<std::vector<std::vector<int32_t>>>();
  } catch (const Json::exception& problem) {
    throw ModelError(fmt::format("{}: {}", path.string(), problem.what()),
                     "start again with --force");
  }
  if (progress.stats_layers < 0 || progress.stats_layers > num_layers ||
      progress.stream_layer < 0 || progress.stream_layer > progress.stats_layers) {
    throw ModelError(fmt::format("{}: implausible layer numbers", path.string()),
                     "start again with --force");
  }
  return progress;
}

// One observing run; owns the streams.
class Observer {
 public:
  Observer(const Model& model, const TokenSet& tokens, std::vector<float> token_weights,
           const ObserveOptions& options, const ObservePlan& plan, const fs::path& folder,
           ThreadPool& pool, const JobControl& control)
      : model_(model),
        tokens_(tokens),
        token_weights_(std::move(token_weights)),
        options_(options),
        plan_(plan),
        folder_(folder),
        pool_(pool),
        reader_(model, {.prefetch = plan.prefetch, .kept_experts = options.kept_experts}),
        sweep_(model, tokens, pool, control, "observe", options.compute) {
    intact_ = MakeStream("stream");
    if (two_streams()) drifted_ = MakeStream("drifted");
  }

  ObserveResult Run() {
    const int64_t num_layers = model_.config().num_layers();
    Progress progress = LoadProgress(folder_, RunFingerprint(plan_.info, options_), num_layers);
    const int64_t start = progress.stream_layer;
    ObserveResult result;
    result.resumed_layers = start;
    const int64_t streams = two_streams() ? 2 : 1;
    sweep_.SetWork(start * tokens_.num_tokens() * streams,
                   num_layers * tokens_.num_tokens() * streams);
    if (start == 0) {
      progress.survivors.clear();
      sweep_.Embed(*intact_);
      if (two_streams()) sweep_.Embed(*drifted_);
    } else {
      intact_->LoadFrom(StreamPath("stream", start));
      if (two_streams()) drifted_->LoadFrom(StreamPath("drifted", start));
    }
    auto last_save = std::chrono::steady_clock::now();
    for (int64_t layer = start; layer < num_layers; ++layer) {
      const LayerWeights& weights = reader_.Get(layer);
      const StatsLayer* stats = FindStats(layer);
      if (stats == nullptr) {
        sweep_.RunLayer(layer, weights, *intact_, nullptr);
        if (two_streams()) sweep_.RunLayer(layer, weights, *drifted_, nullptr);
      } else if (two_streams()) {
        progress.survivors.push_back(TwoStreamLayer(layer, weights, *stats));
      } else {
        LayerStatsWriter writer(folder_, plan_.info, *stats);
        WriteOfLayer(weights, writer);
        StatsCollector collector(plan_.info, *stats, writer, pool_);
        sweep_.RunLayer(layer, weights, *intact_, &collector);
        collector.Finish();
      }
      progress.stats_layers = layer + 1;
      const auto now = std::chrono::steady_clock::now();
      if (layer + 1 < num_layers &&
          std::chrono::duration<double>(now - last_save).count() >= options_.checkpoint_seconds) {
        const int64_t previous = progress.stream_layer;
        intact_->SaveTo(StreamPath("stream", layer + 1));
        if (two_streams()) drifted_->SaveTo(StreamPath("drifted", layer + 1));
        progress.stream_layer = layer + 1;
        SaveProgress(folder_, progress);
        if (previous > 0) {
          fs::remove(StreamPath("stream", previous));
          fs::remove(StreamPath("drifted", previous));
        }
        last_save = std::chrono::steady_clock::now();
      }
    }
    result.bytes_read = reader_.bytes_read();
    result.wait_seconds = reader_.wait_seconds();
    return result;
  }

 private:
  bool two_streams() const { return plan_.info.progressive_keep.has_value(); }
  fs::path StreamPath(const char* name, int64_t layer) const {
    return folder_ / fmt::format("{}-{:04d}.f32", name, layer);
  }
  std::unique_ptr<HiddenStates> MakeStream(const char* name) const {
    const int64_t h = model_.config().hidden_size;
    if (!plan_.spill) return std::make_unique<HiddenStates>(tokens_.num_tokens(), h);
    return std::make_unique<HiddenStates>(tokens_.num_tokens(), h, LargestTile(tokens_),
                                          folder_ / fmt::format("{}.spill", name));
  }
  const StatsLayer* FindStats(int64_t layer) const {
    for (const StatsLayer& stats : plan_.info.layers) {
      if (stats.layer == layer) return &stats;
    }
    return nullptr;
  }

  // What is known of a layer before a token goes through it.
  void WriteOfLayer(const LayerWeights& weights, LayerStatsWriter& writer) const {
    const std::vector<double> flatness = WeightFlatness(weights, pool_);
    writer.WriteWhole("weight_flatness", std::as_bytes(std::span(flatness)));
    if (plan_.info.token_weights) writer.WriteRecords("token_weight", 0, token_weights_);
  }

  // methods.md 13.1: the intact stream gives the target z*, all experts run on the drifted stream's
  // input, the choice is made, and the drifted stream goes on with the survivors alone.
  std::vector<int32_t> TwoStreamLayer(int64_t layer, const LayerWeights& weights,
                                      const StatsLayer& stats) {
    const int64_t h = model_.config().hidden_size;
    LayerStatsWriter writer(folder_, plan_.info, stats);
    WriteOfLayer(weights, writer);
    StatsCollector collector(plan_.info, stats, writer, pool_);
    const bool repair = plan_.info.progressive_target == ProgressiveTarget::kRepairDrift;
    class KeepRouted : public MoeObserver {
     public:
      std::vector<float> routed;
      int64_t first = 0;
      void OnTokens(const MoeTokens& m) override {
        std::memcpy(routed.data() + (m.first_token - first) * m.hidden, m.routed,
                    static_cast<size_t>(m.num_tokens * m.hidden) * sizeof(float));
      }
    } target;
    for (const SequenceTile& tile : sweep_.tiles()) {
      const int64_t n = tile.num_tokens;
      target.routed.resize(static_cast<size_t>(n * h));
      target.first = tile.first_token;
      float* intact = intact_->Load(tile.first_token, n);
      sweep_.RunAttention(weights, tile, intact);
      sweep_.RunFeedForward(weights,
                            {.layer = layer, .first_token = tile.first_token, .observer = &target},
                            n, intact);
      intact_->Store(tile.first_token, n);
      collector.SetTarget(repair ? intact : target.routed.data(), tile.first_token);
      float* drifted = drifted_->Load(tile.first_token, n);
      sweep_.RunAttention(weights, tile, drifted);
      sweep_.RunFeedForward(weights,
                            {.layer = layer,
                             .first_token = tile.first_token,
                             .observer = &collector,
                             .add_to_residual = false},
                            n, drifted);
      drifted_->Store(tile.first_token, n);
      sweep_.Advance(layer, n);
    }
    collector.Finish();
    std::vector<int32_t> kept = options_.choose(folder_, plan_.info, stats);
    AlignedBuffer<std::byte> router_rows;
    const LayerWeights pruned = weights.WithExperts(kept, router_rows);
    for (const SequenceTile& tile : sweep_.tiles()) {
      float* drifted = drifted_->Load(tile.first_token, tile.num_tokens);
      sweep_.RunFeedForward(pruned, {.layer = layer, .first_token = tile.first_token},
                            tile.num_tokens, drifted);
      drifted_->Store(tile.first_token, tile.num_tokens);
      sweep_.Advance(layer, tile.num_tokens);
    }
    return kept;
  }

  const Model& model_;
  const TokenSet& tokens_;
  std::vector<float> token_weights_;
  const ObserveOptions& options_;
  const ObservePlan& plan_;
  fs::path folder_;
  ThreadPool& pool_;
  LayerReader reader_;
  LayerSweep sweep_;
  std::unique_ptr<HiddenStates> intact_, drifted_;
};

StatsInfo MakeInfo(const Model& model, const std::vector<SourceBlocks>& sources,
                   const ObserveOptions& options, StatsLevel level) {
  StatsInfo info = DescribeModel(model);
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const auto layer = static_cast<size_t>(info.layers[i].layer);
    if (layer < options.kept_experts.size() && !options.kept_experts[layer].empty()) {
      info.layers[i].num_experts = static_cast<int64_t>(options.kept_experts[layer].size());
      info.layers[i].as_if_kept = options.kept_experts[layer];
      info.layers[i].model_num_experts = model.config().layers[layer].num_experts;
    }
  }
  info.level = level;
  info.compute = options.compute == ComputePrecision::kF32 ? "f32" : "auto";
  info.isa = ActiveIsa();
  info.batch = options.batch;
  info.progressive_keep = options.progressive_keep;
  info.progressive_target = options.progressive_target;
  info.token_weights = !JoinWeights(sources).empty();
  for (const SourceBlocks& source : sources) info.sources.push_back(DescribeSource(source));
  return info;
}

MemoryPlan MakeMemoryPlan(const Model& model, const TokenSet& tokens, const ObserveOptions& options,
                          const StatsInfo& info, bool prefetch, bool spill, int num_threads) {
  const bool all = info.level == StatsLevel::kFull;
  const int64_t h = model.config().hidden_size;
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  const LayerReaderOptions reading{.prefetch = prefetch, .kept_experts = options.kept_experts};
  memory.Add(prefetch ? "weights of two layers" : "weights of one layer",
             LayerReader::LargestLayerBytes(model, reading) * (prefetch ? 2 : 1));
  const int64_t tile = LargestTile(tokens);
  int64_t chunk = 0, experts = 0;
  for (const LayerConfig& layer : model.config().layers) {
    if (!layer.is_moe) continue;
    chunk = std::max(chunk, FeedForwardBlock::ChunkTokens(model.config(), layer, all));
    experts = std::max(experts, layer.num_experts);
  }
  chunk = std::min(chunk, tile);
  const uint64_t streams = info.progressive_keep ? 2 : 1;
  memory.Add(spill ? "hidden states, one tile (the rest on disk)" : "hidden states of all tokens",
             streams * HiddenStates::Bytes(spill ? tile : tokens.num_tokens(), h));
  if (info.progressive_keep) memory.Add("targets of a tile", HiddenStates::Bytes(tile, h));
  memory.Add("token ids", static_cast<uint64_t>(tokens.num_tokens()) * 8);
  if (info.token_weights)
    memory.Add("token weights", static_cast<uint64_t>(tokens.num_tokens()) * 8);
  memory.Add("work of a tile", LayerSweep::ScratchBytes(model, tokens, all, num_threads));
  memory.Add("statistics of a layer", StatsCollector::Bytes(info, experts, chunk));
  return memory;
}

}  // namespace

ObservePlan PlanObserve(const Model& model, const std::vector<SourceBlocks>& sources,
                        const ObserveOptions& options, int num_threads) {
  if (model.config().MoeLayers().empty()) {
    throw UsageError("the model has no Mixture-of-Experts layers", "there is nothing to observe");
  }
  const TokenSet tokens = JoinSources(sources);
  ObservePlan plan;
  plan.info = MakeInfo(model, sources, options, options.level.value_or(StatsLevel::kFull));
  plan.stats_bytes = StatsBytes(plan.info);
  plan.tera_flop =
      PassFlop(model.config(), tokens.num_tokens(), plan.info.level == StatsLevel::kFull);
  for (const auto& [prefetch, spill] :
       {std::pair{true, false}, {false, false}, {true, true}, {false, true}}) {
    plan.prefetch = prefetch;
    plan.spill = spill;
    plan.memory = MakeMemoryPlan(model, tokens, options, plan.info, prefetch, spill, num_threads);
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

ObserveResult RunObserve(const Model& model, const std::vector<SourceBlocks>& sources,
                         const ObserveOptions& options, const ObservePlan& plan,
                         const fs::path& output, ThreadPool& pool, const JobControl& control) {
  const TokenSet tokens = JoinSources(sources);
  const fs::path folder = output.string() + ".partial";
  if (!options.resume) fs::remove_all(folder);
  fs::create_directories(folder);
  const uint64_t streams = plan.info.progressive_keep ? 2 : 1;
  const uint64_t stream_bytes =
      HiddenStates::Bytes(tokens.num_tokens(), model.config().hidden_size);
  RequireDiskSpace(output, plan.stats_bytes + streams * stream_bytes * (plan.spill ? 3 : 2),
                   "the statistics");
  ObserveResult result;
  {
    Observer observer(model, tokens, JoinWeights(sources), options, plan, folder, pool, control);
    result = observer.Run();
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".f32" || extension == ".spill" || extension == ".tmp" ||
        entry.path().filename() == "progress.json") {
      fs::remove(entry.path());
    }
  }
  WriteFileAtomically(folder / "stats.json", StatsInfoToJson(plan.info).dump(1) + "\n");
  fs::remove_all(output);
  RenameDurably(folder, output);
  return result;
}

}  // namespace winnow
