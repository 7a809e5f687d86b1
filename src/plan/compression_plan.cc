#include "plan/compression_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "base/error.h"

namespace winnow {
namespace {

constexpr const char* kSchema = "winnow.plan/1";
constexpr const char* kHint =
    "see the plan format in docs/FORMATS.md, or make one with winnow plan";

[[noreturn]] void Fail(const std::string& where, const std::string& key,
                       const std::string& expected) {
  throw ModelError(fmt::format("{}: \"{}\": expected {}", where, key, expected), kHint);
}

void RefuseUnknownKeys(const Json& json, const std::string& where,
                       std::initializer_list<const char*> known) {
  if (!json.is_object()) throw ModelError(fmt::format("{}: expected an object", where), kHint);
  for (const auto& [key, value] : json.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    std::string list;
    for (const char* name : known) list += fmt::format("{}{}", list.empty() ? "" : ", ", name);
    throw ModelError(fmt::format("{}: unknown key \"{}\"", where, key),
                     fmt::format("known keys: {}", list));
  }
}

std::string TextOr(const Json& json, const std::string& where, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return {};
  if (!it->is_string()) Fail(where, key, "a string");
  return it->get<std::string>();
}

int64_t IntegerOr(const Json& json, const std::string& where, const char* key, int64_t fallback) {
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return fallback;
  // Re-serialised by a program without integers, 4 may have become 4.0. Larger numbers than 2^62
  // are damage, and no double may be converted before its range is known.
  if (!it->is_number() || it->get<double>() < 0 || it->get<double>() > 0x1p62 ||
      it->get<double>() != static_cast<double>(it->get<int64_t>())) {
    Fail(where, key, "a non-negative integer");
  }
  return it->get<int64_t>();
}

std::optional<double> NumberOr(const Json& json, const std::string& where, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return std::nullopt;
  if (!it->is_number()) Fail(where, key, "a number");
  return it->get<double>();
}

std::vector<int32_t> ExpertList(const Json& json, const std::string& where, const char* key) {
  const auto it = json.find(key);
  if (it == json.end()) return {};
  if (!it->is_array() || it->size() > 65536) Fail(where, key, "a list of expert numbers");
  std::vector<int32_t> list;
  for (const Json& item : *it) {
    if (!item.is_number() || item.get<double>() < 0 || item.get<double>() > 65535 ||
        item.get<double>() != static_cast<double>(item.get<int32_t>())) {
      Fail(where, key, "a list of expert numbers");
    }
    list.push_back(item.get<int32_t>());
  }
  return list;
}

std::vector<double> NumberList(const Json& json, const std::string& where, const char* key) {
  std::vector<double> numbers;
  const auto it = json.find(key);
  if (it == json.end()) return numbers;
  if (!it->is_array() || it->size() > 65536) Fail(where, key, "a list of numbers");
  for (const Json& item : *it) {
    if (!item.is_number()) Fail(where, key, "a list of numbers");
    numbers.push_back(item.get<double>());
  }
  return numbers;
}

std::vector<std::vector<double>> NumberLists(const Json& json, const std::string& where,
                                             const char* key) {
  std::vector<std::vector<double>> lists;
  const auto it = json.find(key);
  if (it == json.end()) return lists;
  if (!it->is_array()) Fail(where, key, "a list of lists of numbers");
  for (const Json& item : *it) {
    const Json wrapped = {{key, item}};
    lists.push_back(NumberList(wrapped, where, key));
  }
  return lists;
}

CondensePlanOfLayer CondensedFromJson(const Json& json, const std::string& where) {
  CondensePlanOfLayer condensed;
  if (!json.contains("experts")) Fail(where, "experts", "a list of expert numbers");
  condensed.experts = ExpertList(json, where, "experts");
  const auto alphas = json.find("alpha");
  if (alphas != json.end()) {
    if (!alphas->is_array() || alphas->size() > 65536) Fail(where, "alpha", "a list of numbers");
    for (const Json& alpha : *alphas) {
      if (!alpha.is_null() && !alpha.is_number()) Fail(where, "alpha", "numbers or null");
      condensed.alphas.push_back(alpha.is_null() ? std::nullopt
                                                 : std::optional(alpha.get<double>()));
    }
  }
  const auto neurons = json.find("neurons");
  if (neurons != json.end()) {
    if (!neurons->is_array()) Fail(where, "neurons", "a list for each of experts");
    for (const Json& item : *neurons) {
      const Json wrapped = {{"neurons", item}};
      condensed.neurons.push_back(ExpertList(wrapped, where, "neurons"));
    }
  }
  condensed.divergence = NumberList(json, where, "js");
  condensed.candidates = NumberLists(json, where, "js_candidates");
  return condensed;
}

LayerPlan LayerFromJson(const Json& json, const std::string& where) {
  RefuseUnknownKeys(json, where,
                    {"layer", "moe_layer", "num_experts", "kept", "dropped", "loss", "margin",
                     "beta", "condensed", "experts", "alpha", "neurons", "js", "js_candidates"});
  if (!json.contains("layer")) Fail(where, "layer", "a decoder layer number");
  if (!json.contains("kept")) Fail(where, "kept", "a list of expert numbers");
  LayerPlan layer;
  layer.layer =
      static_cast<int32_t>(std::min<int64_t>(IntegerOr(json, where, "layer", 0), INT32_MAX));
  layer.num_experts = IntegerOr(json, where, "num_experts", 0);
  layer.kept = ExpertList(json, where, "kept");
  layer.dropped = ExpertList(json, where, "dropped");
  layer.loss = NumberOr(json, where, "loss");
  layer.margin = NumberOr(json, where, "margin");
  layer.beta = NumberOr(json, where, "beta");
  if (layer.beta && !(*layer.beta >= 0 && *layer.beta <= 1)) {
    Fail(where, "beta", "a number from 0 to 1");
  }
  if (json.contains("moe_layer")) {
    layer.moe_layer =
        static_cast<int32_t>(std::min<int64_t>(IntegerOr(json, where, "moe_layer", 0), INT32_MAX));
  }
  const auto condensed = json.find("condensed");
  if (condensed != json.end() && !condensed->is_boolean())
    Fail(where, "condensed", "true or false");
  if (condensed != json.end() && condensed->get<bool>()) {
    layer.condensed = CondensedFromJson(json, where);
  }
  return layer;
}

std::vector<std::pair<std::string, double>> NamedNumbersOr(const Json& json,
                                                           const std::string& where,
                                                           const char* key) {
  std::vector<std::pair<std::string, double>> numbers;
  const auto it = json.find(key);
  if (it == json.end()) return numbers;
  if (!it->is_object()) Fail(where, key, "an object of numbers");
  for (const auto& [name, value] : it->items()) {
    if (!value.is_number()) Fail(where, key, "an object of numbers");
    numbers.emplace_back(name, value.get<double>());
  }
  return numbers;
}

// By name, so that a plan that was read is written with the same bytes.
OrderedJson NamedNumbersToJson(std::vector<std::pair<std::string, double>> numbers) {
  std::sort(numbers.begin(), numbers.end());
  OrderedJson json = OrderedJson::object();
  for (const auto& [name, value] : numbers) json[name] = value;
  return json;
}

bool StrictlyAscending(const std::vector<int32_t>& list) {
  return std::adjacent_find(list.begin(), list.end(), std::greater_equal<>()) == list.end();
}

}  // namespace

void ComposeWithSurvivors(const std::vector<int32_t>& survivors, int64_t num_experts,
                          LayerPlan& layer) {
  for (int32_t& expert : layer.kept) expert = survivors.at(static_cast<size_t>(expert));
  layer.num_experts = num_experts;
  layer.dropped = OtherExperts(layer.kept, num_experts);
}

std::vector<int32_t> OtherExperts(const std::vector<int32_t>& some, int64_t num_experts) {
  std::vector<int32_t> others;
  for (int32_t e = 0; e < num_experts; ++e) {
    if (!std::binary_search(some.begin(), some.end(), e)) others.push_back(e);
  }
  return others;
}

OrderedJson PlanToJson(const CompressionPlan& plan) {
  OrderedJson layers = OrderedJson::array();
  for (const LayerPlan& layer : plan.layers) {
    OrderedJson json = {{"layer", layer.layer}};
    if (layer.moe_layer) json["moe_layer"] = *layer.moe_layer;
    json.update(OrderedJson{{"num_experts", layer.num_experts},
                            {"kept", layer.kept},
                            {"dropped", layer.dropped},
                            {"loss", layer.loss ? OrderedJson(*layer.loss) : OrderedJson()},
                            {"margin", layer.margin ? OrderedJson(*layer.margin) : OrderedJson()}});
    if (layer.beta) json["beta"] = *layer.beta;
    if (plan.condenses()) json["condensed"] = layer.condensed.has_value();
    if (layer.condensed) {
      const CondensePlanOfLayer& condensed = *layer.condensed;
      OrderedJson alphas = OrderedJson::array();
      for (const std::optional<double>& alpha : condensed.alphas) {
        alphas.push_back(alpha ? OrderedJson(*alpha) : OrderedJson());
      }
      json["experts"] = condensed.experts;
      json["alpha"] = alphas;
      if (!condensed.neurons.empty()) json["neurons"] = condensed.neurons;
      if (!condensed.divergence.empty()) {
        json["js"] = condensed.divergence;
        json["js_candidates"] = condensed.candidates;
      }
    }
    layers.push_back(std::move(json));
  }
  OrderedJson calibration = {{"sources", plan.sources}, {"tokens", plan.calibration_tokens}};
  if (!plan.mix.empty()) calibration["mix"] = NamedNumbersToJson(plan.mix);
  OrderedJson predicted = {{"bytes_before", plan.bytes_before}, {"bytes_after", plan.bytes_after}};
  if (plan.output_loss) {
    predicted["output_loss"] = *plan.output_loss;
    predicted["output_loss_by_source"] = NamedNumbersToJson(plan.output_loss_by_source);
  }
  OrderedJson json = {
      {"schema", kSchema},
      {"method", plan.method},
      {"search", plan.search},
      {"objective", plan.objective},
      {"target", plan.target},
      {"model", {{"model_type", plan.model_type}, {"fingerprint", plan.model_fingerprint}}},
      {"calibration", calibration},
      {"predicted", predicted}};
  if (!plan.layer_order.empty()) {
    json["layer_order"] = plan.layer_order;
    if (plan.layer_kl.empty()) {
      json["layer_js"] = plan.layer_divergence;
      json["layer_js_candidates"] = plan.layer_candidates;
    } else {
      json["layer_kl"] = plan.layer_kl;
    }
  }
  json["layers"] = layers;
  return json;
}

bool CompressionPlan::condenses() const {
  return std::any_of(layers.begin(), layers.end(),
                     [](const LayerPlan& layer) { return layer.condensed.has_value(); });
}

std::vector<double> AlphasOf(const CondensePlanOfLayer& condensed) {
  std::vector<double> alphas;
  for (const int32_t expert : condensed.experts) {
    const auto at = static_cast<size_t>(expert);
    alphas.push_back(at < condensed.alphas.size() ? condensed.alphas[at].value_or(kUnselectedAlpha)
                                                  : kUnselectedAlpha);
  }
  return alphas;
}

std::vector<FusedPart> FusedParts(const LayerPlan& layer, const ModelConfig& config) {
  std::vector<FusedPart> parts;
  const int64_t shared = config.layers.at(static_cast<size_t>(layer.layer)).shared_width;
  if (shared > 0 && !config.shared_expert_gated) parts.push_back({});
  const CondensePlanOfLayer& condensed = layer.condensed.value();
  const std::vector<double> alphas = AlphasOf(condensed);
  for (size_t i = 0; i < condensed.experts.size(); ++i) {
    parts.push_back({condensed.experts[i], alphas[i],
                     condensed.neurons.empty() ? std::vector<int32_t>() : condensed.neurons[i]});
  }
  return parts;
}

CompressionPlan PlanFromJson(const Json& json, const std::string& where) {
  RefuseUnknownKeys(
      json, where,
      {"schema", "method", "search", "objective", "target", "model", "calibration", "predicted",
       "layer_order", "layer_js", "layer_js_candidates", "layer_kl", "layers"});
  if (TextOr(json, where, "schema") != kSchema)
    Fail(where, "schema", fmt::format("\"{}\"", kSchema));
  CompressionPlan plan;
  plan.method = TextOr(json, where, "method");
  plan.search = TextOr(json, where, "search");
  plan.objective = TextOr(json, where, "objective");
  plan.target = TextOr(json, where, "target");
  if (!json.contains("model")) Fail(where, "model", "an object with model_type");
  RefuseUnknownKeys(json["model"], where + ": model", {"model_type", "fingerprint"});
  plan.model_type = TextOr(json["model"], where, "model_type");
  plan.model_fingerprint = TextOr(json["model"], where, "fingerprint");
  if (json.contains("calibration")) {
    const Json& calibration = json["calibration"];
    RefuseUnknownKeys(calibration, where + ": calibration", {"sources", "tokens", "mix"});
    plan.mix = NamedNumbersOr(calibration, where, "mix");
    if (calibration.contains("sources")) {
      for (const Json& name : calibration["sources"]) {
        if (!name.is_string()) Fail(where, "calibration.sources", "a list of names");
        plan.sources.push_back(name.get<std::string>());
      }
    }
    plan.calibration_tokens = IntegerOr(calibration, where, "tokens", 0);
  }
  if (json.contains("predicted")) {
    const Json& predicted = json["predicted"];
    RefuseUnknownKeys(predicted, where + ": predicted",
                      {"bytes_before", "bytes_after", "output_loss", "output_loss_by_source"});
    plan.output_loss = NumberOr(predicted, where, "output_loss");
    plan.output_loss_by_source = NamedNumbersOr(predicted, where, "output_loss_by_source");
    plan.bytes_before = static_cast<uint64_t>(IntegerOr(predicted, where, "bytes_before", 0));
    plan.bytes_after = static_cast<uint64_t>(IntegerOr(predicted, where, "bytes_after", 0));
  }
  plan.layer_order = ExpertList(json, where, "layer_order");
  plan.layer_divergence = NumberList(json, where, "layer_js");
  plan.layer_candidates = NumberLists(json, where, "layer_js_candidates");
  plan.layer_kl = NumberList(json, where, "layer_kl");
  if (!json.contains("layers") || !json["layers"].is_array()) Fail(where, "layers", "a list");
  for (const Json& item : json["layers"]) {
    plan.layers.push_back(
        LayerFromJson(item, fmt::format("{}: layers[{}]", where, plan.layers.size())));
  }
  return plan;
}

std::vector<double> SkipBetasOf(const CompressionPlan& plan, int64_t num_layers) {
  std::vector<double> betas;
  for (const LayerPlan& layer : plan.layers) {
    if (!layer.beta) continue;
    betas.resize(static_cast<size_t>(num_layers));
    betas.at(static_cast<size_t>(layer.layer)) = *layer.beta;
  }
  return betas;
}

CompressionPlan ReadPlan(const fs::path& path) {
  return PlanFromJson(ParseJson(ReadTextFile(path), path.string()), path.string());
}

namespace {

// A condensed layer of a plan against the model.
void CheckCondensed(const LayerPlan& layer, const ModelConfig& config, const std::string& where) {
  const LayerConfig& of = config.layers[static_cast<size_t>(layer.layer)];
  const CondensePlanOfLayer& condensed = *layer.condensed;
  std::vector<int32_t> sorted = condensed.experts;
  std::sort(sorted.begin(), sorted.end());
  if (!StrictlyAscending(sorted) ||
      (!sorted.empty() && (sorted.front() < 0 || sorted.back() >= of.num_experts))) {
    throw UsageError(fmt::format("{}: `experts` must be different expert numbers below {}", where,
                                 of.num_experts));
  }
  if (sorted != layer.kept) {
    throw UsageError(fmt::format("{}: `kept` and `experts` name different experts", where));
  }
  if (sorted.empty() && of.shared_width == 0) {
    throw UsageError(
        fmt::format("{}: nothing is left of the layer, which has no shared expert", where),
        "keep at least one expert");
  }
  if (layer.beta) {
    throw UsageError(
        fmt::format("{}: a condensed layer skips no experts, it has no `beta`", where));
  }
  if (!condensed.experts.empty() && std::ssize(condensed.alphas) != of.num_experts) {
    throw UsageError(fmt::format("{}: `alpha` must have a number or null for each of {} experts",
                                 where, of.num_experts));
  }
  for (const double alpha : AlphasOf(condensed)) {
    if (!(std::abs(alpha) <= 1e6)) {
      throw UsageError(fmt::format("{}: alpha is {}, expected a moderate number", where, alpha));
    }
  }
  if (!condensed.neurons.empty() && condensed.neurons.size() != condensed.experts.size()) {
    throw UsageError(fmt::format("{}: `neurons` needs a list for each of {} experts", where,
                                 condensed.experts.size()));
  }
  for (const std::vector<int32_t>& neurons : condensed.neurons) {
    if (neurons.empty() || !StrictlyAscending(neurons) || neurons.front() < 0 ||
        neurons.back() >= of.expert_width) {
      throw UsageError(
          fmt::format("{}: `neurons` must be ascending numbers below {}", where, of.expert_width));
    }
  }
}

}  // namespace

void CheckPlan(const CompressionPlan& plan, const Model& model) {
  const ModelConfig& config = model.config();
  if (!plan.model_type.empty() && plan.model_type != config.family->model_type) {
    throw UsageError(fmt::format("the plan is for a {} model, this is {}", plan.model_type,
                                 config.family->model_type),
                     "make a plan from statistics of this model");
  }
  if (!plan.model_fingerprint.empty() &&
      plan.model_fingerprint != model.checkpoint().FingerprintHex()) {
    throw UsageError("the plan was made for another model (its fingerprint differs)",
                     "make a plan from statistics of this model; to apply it all the same, remove "
                     "model.fingerprint from the plan");
  }
  std::vector<int32_t> planned;
  for (const LayerPlan& layer : plan.layers) {
    const std::string where = fmt::format("the plan for layer {}", layer.layer);
    if (layer.layer < 0 || layer.layer >= config.num_layers() ||
        !config.layers[static_cast<size_t>(layer.layer)].is_moe) {
      throw UsageError(fmt::format("{}: the model has no experts there", where));
    }
    const int64_t experts = config.layers[static_cast<size_t>(layer.layer)].num_experts;
    if (layer.num_experts != 0 && layer.num_experts != experts) {
      throw UsageError(fmt::format("{} expects {} experts, the model has {}", where,
                                   layer.num_experts, experts));
    }
    if (layer.condensed) {
      CheckCondensed(layer, config, where);
      planned.push_back(layer.layer);
      continue;
    }
    if (layer.kept.empty() || !StrictlyAscending(layer.kept) || layer.kept.front() < 0 ||
        layer.kept.back() >= experts) {
      throw UsageError(
          fmt::format("{}: `kept` must be ascending expert numbers below {}", where, experts));
    }
    if (static_cast<int64_t>(layer.kept.size()) < config.num_experts_per_tok) {
      throw UsageError(fmt::format("{} keeps {} experts, but each token uses {}", where,
                                   layer.kept.size(), config.num_experts_per_tok),
                       "keep at least num_experts_per_tok experts");
    }
    for (const int32_t expert : layer.dropped) {
      if (expert < 0 || expert >= experts ||
          std::binary_search(layer.kept.begin(), layer.kept.end(), expert)) {
        throw UsageError(fmt::format("{}: expert {} is both kept and dropped, or does not exist",
                                     where, expert));
      }
    }
    if (!layer.dropped.empty() &&
        static_cast<int64_t>(layer.kept.size() + layer.dropped.size()) != experts) {
      throw UsageError(fmt::format("{}: kept and dropped experts are not all {}", where, experts));
    }
    planned.push_back(layer.layer);
  }
  if (planned != config.MoeLayers()) {
    throw UsageError(fmt::format("the plan names {} layers, the model has {} MoE layers",
                                 planned.size(), config.MoeLayers().size()),
                     "a plan lists every MoE layer once, in ascending order");
  }
}

std::vector<std::vector<int32_t>> KeptExperts(const CompressionPlan& plan, int64_t num_layers) {
  std::vector<std::vector<int32_t>> kept(static_cast<size_t>(num_layers));
  for (const LayerPlan& layer : plan.layers) {
    if (!layer.condensed) kept[static_cast<size_t>(layer.layer)] = layer.kept;
  }
  return kept;
}

}  // namespace winnow
