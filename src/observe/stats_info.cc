#include "observe/stats_info.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/json_record.h"

namespace winnow {
namespace {

constexpr const char* kSchema = "winnow.stats/2";
constexpr int64_t kMaxCount = int64_t{1} << 40;  // tokens, bytes of a plausible run

class Fields : public JsonRecord {
 public:
  Fields(const Json& json, std::string where)
      : JsonRecord(json, std::move(where),
                   "the statistics are damaged or of another version; observe again") {}
};

}  // namespace

std::string_view StatsLevelName(StatsLevel level) {
  switch (level) {
    case StatsLevel::kRouting:
      return "routing";
    case StatsLevel::kRouted:
      return "routed";
    case StatsLevel::kFull:
      return "full";
  }
  return "";
}

StatsLevel ParseStatsLevel(const std::string& name) {
  for (const StatsLevel level : {StatsLevel::kRouting, StatsLevel::kRouted, StatsLevel::kFull}) {
    if (name == StatsLevelName(level)) return level;
  }
  throw UsageError(fmt::format("--stats: \"{}\" is not routing, routed or full", name));
}

int64_t StatsInfo::num_tokens() const {
  int64_t total = 0;
  for (const StatsSource& source : sources) total += source.num_tokens;
  return total;
}

int64_t StatsInfo::num_experts() const {
  int64_t total = 0;
  for (const StatsLayer& layer : layers) total += layer.num_experts;
  return total;
}

std::vector<StatsBatch> StatsInfo::Batches() const {
  std::vector<StatsBatch> batches;
  int64_t token = 0;
  for (size_t s = 0; s < sources.size(); ++s) {
    int64_t in_batch = 0;
    for (const auto& [length, repeats] : sources[s].lengths) {
      for (int64_t i = 0; i < repeats; ++i) {
        if (in_batch == 0) batches.push_back({token, 0, s, sources[s].mix});
        batches.back().num_tokens += length;
        token += length;
        in_batch = (in_batch + 1) % batch;
      }
    }
  }
  return batches;
}

std::vector<int64_t> StatsInfo::BatchTokens() const {
  std::vector<int64_t> tokens;
  for (const StatsBatch& each : Batches()) tokens.push_back(each.num_tokens);
  return tokens;
}

OrderedJson StatsInfoToJson(const StatsInfo& info) {
  OrderedJson sources = OrderedJson::array(), layers = OrderedJson::array();
  for (const StatsSource& source : info.sources) {
    sources.push_back({{"name", source.name},
                       {"fingerprint", source.fingerprint},
                       {"sequences", source.num_sequences},
                       {"tokens", source.num_tokens},
                       {"lengths", source.lengths}});
  }
  for (const StatsLayer& layer : info.layers) {
    layers.push_back({{"layer", layer.layer},
                      {"num_experts", layer.num_experts},
                      {"expert_bytes", layer.expert_bytes}});
    if (!layer.as_if_kept.empty()) {
      layers.back()["as_if_kept"] = layer.as_if_kept;
      layers.back()["model_num_experts"] = layer.model_num_experts;
    }
  }
  OrderedJson json = {{"schema", kSchema},
                      {"model",
                       {{"fingerprint", info.model_fingerprint},
                        {"model_type", info.model_type},
                        {"bytes", info.model_bytes},
                        {"num_layers", info.num_layers},
                        {"hidden_size", info.hidden_size},
                        {"num_experts_per_tok", info.num_experts_per_tok},
                        {"norm_topk_prob", info.norm_topk_prob},
                        {"normalize_epsilon", info.normalize_epsilon}}},
                      {"level", StatsLevelName(info.level)},
                      {"compute", info.compute},
                      {"isa", info.isa},
                      {"batch", info.batch},
                      {"progressive_keep",
                       info.progressive_keep ? OrderedJson(*info.progressive_keep) : OrderedJson()},
                      {"token_weights", info.token_weights},
                      {"sources", sources},
                      {"layers", layers}};
  if (info.progressive_keep) {
    json["progressive_target"] =
        info.progressive_target == ProgressiveTarget::kRepairDrift ? "repair-drift" : "published";
  }
  return json;
}

StatsInfo StatsInfoFromJson(const Json& json, const std::string& where) {
  const Fields root(json, where);
  if (root.Text("schema") != kSchema) root.Fail("schema", fmt::format("\"{}\"", kSchema));
  StatsInfo info;
  const Fields model(root.At("model"), where + ": model");
  info.model_fingerprint = model.Text("fingerprint");
  info.model_type = model.Text("model_type");
  info.model_bytes = static_cast<uint64_t>(model.Integer("bytes", 0, INT64_MAX));
  info.num_layers = model.Integer("num_layers", 1, 4096);
  info.hidden_size = model.Integer("hidden_size", 1, 1 << 26);
  info.num_experts_per_tok = model.Integer("num_experts_per_tok", 1, 65536);
  info.norm_topk_prob = model.Flag("norm_topk_prob");
  if (!model.At("normalize_epsilon").is_number()) model.Fail("normalize_epsilon", "a number");
  info.normalize_epsilon = model.At("normalize_epsilon").get<double>();
  const std::string level = root.Text("level");
  if (level != "routing" && level != "routed" && level != "full")
    root.Fail("level", "a known level");
  info.level = ParseStatsLevel(level);
  info.compute = root.Text("compute");
  info.isa = root.Text("isa");
  info.batch = root.Integer("batch", 1, kMaxCount);
  if (!root.At("progressive_keep").is_null()) {
    info.progressive_keep = root.Integer("progressive_keep", 1, 65536);
    const std::string target = root.Text("progressive_target");
    if (target != "published" && target != "repair-drift") {
      root.Fail("progressive_target", "\"published\" or \"repair-drift\"");
    }
    if (target == "repair-drift") info.progressive_target = ProgressiveTarget::kRepairDrift;
  }
  info.token_weights = root.Flag("token_weights");
  int64_t total = 0;
  for (const Json& item : root.List("sources")) {
    const Fields fields(item, where + ": sources");
    StatsSource source;
    source.name = fields.Text("name");
    source.fingerprint = fields.Text("fingerprint");
    source.num_sequences = fields.Integer("sequences", 0, kMaxCount);
    source.num_tokens = fields.Integer("tokens", 0, kMaxCount);
    int64_t sequences = 0, tokens = 0;
    for (const Json& run : fields.List("lengths")) {
      if (!run.is_array() || run.size() != 2 || !run[0].is_number_integer() ||
          !run[1].is_number_integer()) {
        fields.Fail("lengths", "pairs [length, repeats]");
      }
      const auto length = run[0].get<int64_t>(), repeats = run[1].get<int64_t>();
      // Bounded before they are multiplied: both come from the file.
      // Without empty sequences their number is bounded by the tokens, which files must hold.
      if (length < 1 || repeats < 1 || length > kMaxCount || repeats > source.num_sequences ||
          repeats > kMaxCount / length) {
        fields.Fail("lengths", "plausible pairs [length, repeats]");
      }
      sequences += repeats;
      tokens += length * repeats;
      if (sequences > kMaxCount || tokens > kMaxCount) fields.Fail("lengths", "plausible totals");
      source.lengths.emplace_back(length, repeats);
    }
    if (sequences != source.num_sequences || tokens != source.num_tokens) {
      fields.Fail("lengths", fmt::format("{} sequences of {} tokens in all", source.num_sequences,
                                         source.num_tokens));
    }
    total += tokens;
    if (total > kMaxCount) fields.Fail("tokens", "a plausible total");
    info.sources.push_back(std::move(source));
  }
  for (const Json& item : root.List("layers")) {
    const Fields fields(item, where + ": layers");
    StatsLayer layer;
    layer.layer = static_cast<int32_t>(fields.Integer("layer", 0, info.num_layers - 1));
    layer.num_experts = fields.Integer("num_experts", info.num_experts_per_tok, 65536);
    layer.expert_bytes = static_cast<uint64_t>(fields.Integer("expert_bytes", 0, INT64_MAX));
    if (item.contains("as_if_kept")) {
      layer.model_num_experts = fields.Integer("model_num_experts", layer.num_experts, 65536);
      for (const Json& expert : fields.List("as_if_kept")) {
        const int32_t last = layer.as_if_kept.empty() ? -1 : layer.as_if_kept.back();
        if (!expert.is_number_integer() || expert.get<int64_t>() <= last ||
            expert.get<int64_t>() >= layer.model_num_experts) {
          fields.Fail("as_if_kept", "ascending expert numbers of the model");
        }
        layer.as_if_kept.push_back(expert.get<int32_t>());
      }
      if (static_cast<int64_t>(layer.as_if_kept.size()) != layer.num_experts) {
        fields.Fail("as_if_kept", fmt::format("{} expert numbers", layer.num_experts));
      }
    }
    if (!info.layers.empty() && info.layers.back().layer >= layer.layer) {
      fields.Fail("layer", "layers in ascending order");
    }
    info.layers.push_back(layer);
  }
  return info;
}

StatsInfo ReadStatsInfo(const fs::path& stats_folder) {
  const fs::path path = stats_folder / "stats.json";
  if (!fs::exists(path)) {
    throw UsageError(
        fmt::format("{} is not a statistics folder: stats.json is missing", stats_folder.string()),
        "make one with: winnow observe MODEL --calib TEXT -o STATS");
  }
  return StatsInfoFromJson(ParseJson(ReadTextFile(path), path.string()), path.string());
}

fs::path LayerStatsPath(const fs::path& stats_folder, int32_t layer) {
  return stats_folder / fmt::format("layer-{:04d}.safetensors", layer);
}

StatsInfo DescribeModel(const Model& model) {
  StatsInfo info;
  const ModelConfig& config = model.config();
  info.model_fingerprint = model.checkpoint().FingerprintHex();
  info.model_type = std::string(config.family->model_type);
  info.model_bytes = model.checkpoint().total_bytes();
  info.num_layers = config.num_layers();
  info.hidden_size = config.hidden_size;
  info.num_experts_per_tok = config.num_experts_per_tok;
  info.norm_topk_prob = config.norm_topk_prob;
  info.normalize_epsilon = config.normalize_epsilon;
  for (const int32_t layer : config.MoeLayers()) {
    const LayerSlices& slices = model.layers()[static_cast<size_t>(layer)];
    const int64_t experts = config.layers[static_cast<size_t>(layer)].num_experts;
    info.layers.push_back({layer, experts, slices.ExpertBytes() / static_cast<uint64_t>(experts)});
  }
  return info;
}

}  // namespace winnow
