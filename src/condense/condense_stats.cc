#include "condense/condense_stats.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/hash.h"
#include "base/json_record.h"
#include "checkpoint/safetensors_writer.h"
#include "text/text_source.h"

namespace winnow {
namespace {

constexpr const char* kSchema = "winnow.condense/1";
constexpr const char* kStatsName = "stats.json";
constexpr const char* kTokensName = "search.safetensors";
constexpr const char* kExperts = "cd-moe";
constexpr const char* kNeurons = "condense";
constexpr int64_t kMaxCount = int64_t{1} << 40;

class Fields : public JsonRecord {
 public:
  Fields(const Json& json, std::string where)
      : JsonRecord(json, std::move(where), "observe again with the same --method") {}
};

CondenseLayer LayerFromJson(const Fields& fields, int64_t num_layers, int64_t max_experts) {
  CondenseLayer layer;
  layer.layer = static_cast<int32_t>(fields.Integer("layer", 0, num_layers - 1));
  layer.moe_layer = static_cast<int32_t>(fields.Integer("moe_layer", 0, num_layers - 1));
  layer.num_experts = fields.Integer("num_experts", 1, 65536);
  const auto experts = static_cast<size_t>(layer.num_experts);
  layer.alpha_sum = fields.Numbers("alpha_sum", fields.List("alpha_sum"));
  for (const Json& count : fields.List("alpha_count")) {
    if (!count.is_number_integer() || count.get<int64_t>() < 0) {
      fields.Fail("alpha_count", "counts of tokens");
    }
    layer.alpha_count.push_back(count.get<int64_t>());
  }
  if (layer.alpha_sum.size() != experts || layer.alpha_count.size() != experts) {
    fields.Fail("alpha_sum", fmt::format("{} numbers, as alpha_count", experts));
  }
  const Json& chosen = fields.List("experts");
  const std::vector<double> divergence = fields.Numbers("js", fields.List("js"));
  const Json& candidates = fields.List("js_candidates");
  if (divergence.size() != chosen.size() || candidates.size() != chosen.size() ||
      std::ssize(chosen) != std::min(max_experts, layer.num_experts)) {
    fields.Fail("experts", "as many as js and js_candidates, max_experts of them");
  }
  std::vector<bool> seen(experts);
  for (size_t s = 0; s < chosen.size(); ++s) {
    if (!chosen[s].is_number_integer() || chosen[s].get<int64_t>() < 0 ||
        chosen[s].get<int64_t>() >= layer.num_experts || seen[chosen[s].get<size_t>()]) {
      fields.Fail("experts", "different expert numbers");
    }
    seen[chosen[s].get<size_t>()] = true;
    layer.steps.push_back(
        {chosen[s].get<int32_t>(), divergence[s], fields.Numbers("js_candidates", candidates[s])});
  }
  return layer;
}

CondenseLayer NeuronsFromJson(const Fields& fields, int64_t num_layers, int64_t max_experts) {
  CondenseLayer layer;
  layer.layer = static_cast<int32_t>(fields.Integer("layer", 0, num_layers - 1));
  layer.moe_layer = static_cast<int32_t>(fields.Integer("moe_layer", 0, num_layers - 1));
  layer.num_experts = fields.Integer("num_experts", 1, 65536);
  const auto whole = [&](const char* key, int64_t limit) {
    std::vector<int32_t> numbers;
    for (const Json& item : fields.List(key)) {
      if (!item.is_number_integer() || item.get<int64_t>() < 0 || item.get<int64_t>() >= limit) {
        fields.Fail(key, fmt::format("numbers from 0 to {}", limit - 1));
      }
      numbers.push_back(item.get<int32_t>());
    }
    return numbers;
  };
  layer.neuron_experts = whole("neuron_experts", layer.num_experts);
  layer.neuron_rows = whole("neuron_rows", int64_t{1} << 26);
  layer.width_errors = fields.Numbers("width_errors", fields.List("width_errors"));
  layer.width_fold_errors = fields.Numbers("width_fold_errors", fields.List("width_fold_errors"));
  for (const Json& item : fields.List("width_alphas")) {
    layer.width_alphas.push_back(fields.Numbers("width_alphas", item));
    if (std::ssize(layer.width_alphas.back()) != layer.num_experts) {
      fields.Fail("width_alphas", "a number for each expert");
    }
  }
  if (layer.neuron_experts.size() != layer.neuron_rows.size() ||
      std::ssize(layer.width_errors) != max_experts + 1 ||
      layer.width_fold_errors.size() != layer.width_errors.size() ||
      layer.width_alphas.size() != layer.width_errors.size()) {
    fields.Fail("width_errors", "numbers for every width, and neurons");
  }
  return layer;
}

}  // namespace

std::optional<double> CondenseLayer::Alpha(int32_t expert) const {
  const auto at = static_cast<size_t>(expert);
  if (alpha_count.at(at) == 0) return std::nullopt;
  return alpha_sum.at(at) / static_cast<double>(alpha_count[at]);
}

OrderedJson CondenseStatsToJson(const CondenseStats& stats) {
  OrderedJson layers = OrderedJson::array();
  for (const CondenseLayer& layer : stats.layers) {
    OrderedJson experts = OrderedJson::array(), js = OrderedJson::array(),
                candidates = OrderedJson::array();
    for (const GreedyStep& step : layer.steps) {
      experts.push_back(step.chosen);
      js.push_back(step.divergence);
      candidates.push_back(step.candidates);
    }
    if (stats.method == kNeurons) {
      layers.push_back({{"layer", layer.layer},
                        {"moe_layer", layer.moe_layer},
                        {"num_experts", layer.num_experts},
                        {"neuron_experts", layer.neuron_experts},
                        {"neuron_rows", layer.neuron_rows},
                        {"width_errors", layer.width_errors},
                        {"width_fold_errors", layer.width_fold_errors},
                        {"width_alphas", layer.width_alphas}});
      continue;
    }
    layers.push_back({{"layer", layer.layer},
                      {"moe_layer", layer.moe_layer},
                      {"num_experts", layer.num_experts},
                      {"alpha_sum", layer.alpha_sum},
                      {"alpha_count", layer.alpha_count},
                      {"experts", experts},
                      {"js", js},
                      {"js_candidates", candidates}});
  }
  return {{"schema", kSchema},
          {"model",
           {{"fingerprint", stats.model_fingerprint},
            {"model_type", stats.model_type},
            {"num_layers", stats.num_layers}}},
          {"method", stats.method},
          {"compute", stats.compute},
          {"isa", stats.isa},
          {"max_experts", stats.max_experts},
          {"most_neurons", stats.most_neurons},
          {"search",
           {{"sources", stats.search_sources},
            {"fingerprint", stats.search_fingerprint},
            {"tokens", stats.search_tokens}}},
          {"alpha",
           {{"sources", stats.alpha_sources},
            {"fingerprint", stats.alpha_fingerprint},
            {"tokens", stats.alpha_tokens}}},
          {"layers", layers}};
}

CondenseStats CondenseStatsFromJson(const Json& json, const std::string& where) {
  const Fields root(json, where);
  if (root.Text("schema") != kSchema) root.Fail("schema", fmt::format("\"{}\"", kSchema));
  CondenseStats stats;
  const Fields model(root.At("model"), where + ": model");
  stats.model_fingerprint = model.Text("fingerprint");
  stats.model_type = model.Text("model_type");
  stats.num_layers = model.Integer("num_layers", 1, 4096);
  stats.method = root.Text("method");
  if (stats.method != kExperts && stats.method != kNeurons) {
    root.Fail("method", "cd-moe or condense");
  }
  stats.compute = root.Text("compute");
  if (stats.compute != "f32" && stats.compute != "auto") root.Fail("compute", "f32 or auto");
  stats.isa = root.Text("isa");
  stats.max_experts = root.Integer("max_experts", 0, 65536);
  stats.most_neurons = root.Integer("most_neurons", 0, kMaxCount);
  const Fields search(root.At("search"), where + ": search");
  stats.search_sources = search.Names("sources");
  stats.search_fingerprint = search.Text("fingerprint");
  stats.search_tokens = search.Integer("tokens", 0, kMaxCount);
  const Fields alpha(root.At("alpha"), where + ": alpha");
  stats.alpha_sources = alpha.Names("sources");
  stats.alpha_fingerprint = alpha.Text("fingerprint");
  stats.alpha_tokens = alpha.Integer("tokens", 0, kMaxCount);
  for (const Json& item : root.List("layers")) {
    const Fields fields(item, fmt::format("{}: layers[{}]", where, stats.layers.size()));
    stats.layers.push_back(stats.method == kNeurons
                               ? NeuronsFromJson(fields, stats.num_layers, stats.max_experts)
                               : LayerFromJson(fields, stats.num_layers, stats.max_experts));
    const CondenseLayer& last = stats.layers.back();
    if (last.moe_layer != std::ssize(stats.layers) - 1 ||
        (stats.layers.size() > 1 && stats.layers[stats.layers.size() - 2].layer >= last.layer)) {
      fields.Fail("layer", "MoE layers in ascending order");
    }
  }
  return stats;
}

bool IsCondenseStats(const fs::path& folder) {
  const fs::path path = folder / kStatsName;
  if (!fs::exists(path)) return false;
  const Json json = ParseJson(ReadTextFile(path), path.string());
  return json.is_object() && json.contains("schema") && json["schema"] == kSchema;
}

CondenseStats ReadCondenseStats(const fs::path& folder) {
  const fs::path path = folder / kStatsName;
  if (!fs::exists(path)) {
    throw UsageError(
        fmt::format("{} is not a statistics folder: {} is missing", folder.string(), kStatsName),
        "make one with: winnow observe MODEL --method cd-moe --calib TEXT -o STATS");
  }
  return CondenseStatsFromJson(ParseJson(ReadTextFile(path), path.string()), path.string());
}

void CheckCondenseStats(const CondenseStats& stats, const Model& model) {
  if (stats.model_fingerprint != model.checkpoint().FingerprintHex()) {
    throw UsageError("the statistics are of another model (its fingerprint differs)",
                     "observe this model, or give the one that was observed with --model");
  }
  const std::vector<int32_t> moe = model.config().MoeLayers();
  bool same = moe.size() == stats.layers.size();
  for (size_t i = 0; same && i < moe.size(); ++i) {
    same = stats.layers[i].layer == moe[i] &&
           stats.layers[i].num_experts ==
               model.config().layers[static_cast<size_t>(moe[i])].num_experts;
  }
  if (!same) {
    throw ModelError("the statistics name other layers than the model has",
                     "observe again with the same --method");
  }
  if (stats.method != kNeurons) return;
  for (const CondenseLayer& layer : stats.layers) {
    const LayerConfig& config = model.config().layers[static_cast<size_t>(layer.layer)];
    const int64_t width = config.expert_width;
    std::vector<uint8_t> seen(static_cast<size_t>(layer.num_experts * width));
    bool plausible =
        std::ssize(layer.neuron_rows) == std::min(stats.max_experts, layer.num_experts) * width;
    for (size_t i = 0; plausible && i < layer.neuron_rows.size(); ++i) {
      const int64_t neuron = layer.neuron_experts[i] * width + layer.neuron_rows[i];
      plausible = layer.neuron_rows[i] < width && seen[static_cast<size_t>(neuron)]++ == 0;
    }
    for (const std::vector<double>& alphas : layer.width_alphas) {
      for (const double alpha : alphas) plausible = plausible && std::abs(alpha) <= 1e6;
    }
    if (!plausible) {
      throw ModelError(fmt::format("the statistics of layer {} do not fit the model: expected {} "
                                   "different neurons of experts of {} and moderate weights",
                                   layer.layer, stats.max_experts * width, width),
                       "observe again with --method condense");
    }
  }
}

void WriteSearchTokens(const fs::path& folder, const TokenSet& tokens) {
  const std::vector<TensorData> tensors = {
      {"input_ids", Dtype::kI32, {tokens.ids.size()}, std::as_bytes(std::span(tokens.ids))},
      {"offsets", Dtype::kI64, {tokens.offsets.size()}, std::as_bytes(std::span(tokens.offsets))}};
  WriteSafetensors(folder / kTokensName, tensors);
}

TokenSet ReadSearchTokens(const fs::path& folder, const CondenseStats& stats) {
  if (!fs::exists(folder / kTokensName)) {
    throw ModelError(fmt::format("{}: {} is missing", folder.string(), kTokensName),
                     "the statistics are incomplete: observe again");
  }
  const TokenSequences sequences = ReadTokenIds(folder / kTokensName);
  TokenSet tokens{sequences.ids, sequences.offsets};
  if (FingerprintOf(tokens) != stats.search_fingerprint) {
    throw ModelError(
        fmt::format("{}: {} is not the text that was observed", folder.string(), kTokensName),
        "observe again");
  }
  return tokens;
}

std::string FingerprintOf(const TokenSet& tokens) {
  Fingerprint fingerprint;
  fingerprint.Add(std::as_bytes(std::span(tokens.ids)));
  fingerprint.Add(std::as_bytes(std::span(tokens.offsets)));
  return fingerprint.Hex();
}

}  // namespace winnow
