#include "model/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "base/error.h"
#include "model/quantization_config.h"

namespace winnow {
namespace {

constexpr std::array kExpertCountKeys = {"num_local_experts", "num_experts", "n_routed_experts"};
// A sane upper bound for every dimension: larger numbers in a config are damage, and products of
// several such numbers must not overflow before the tensors' real shapes are compared.
constexpr int64_t kMaxDimension = int64_t{1} << 26;
constexpr int64_t kMaxLayers = 4096;

class ConfigReader {
 public:
  ConfigReader(const OrderedJson& config, std::string where)
      : config_(config), where_(std::move(where)) {}

  const OrderedJson* Find(const std::string& key) const {
    const auto it = config_.find(key);
    return it == config_.end() || it->is_null() ? nullptr : &*it;
  }
  [[noreturn]] void Fail(const std::string& key, const std::string& expected,
                         const std::string& got) const {
    throw ModelError(fmt::format("{}: \"{}\": expected {}, got {}", where_, key, expected, got),
                     "compare the file with the published one of this model");
  }
  std::optional<double> Number(const std::string& key) const {
    const OrderedJson* value = Find(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number()) Fail(key, "a number", value->dump());
    return value->get<double>();
  }
  std::optional<int64_t> Integer(const std::string& key, int64_t low, int64_t high) const {
    const auto number = Number(key);
    if (!number) return std::nullopt;
    // Some writers spell integers as floats (40.0).
    if (*number != std::floor(*number) || *number < static_cast<double>(low) ||
        *number > static_cast<double>(high)) {
      Fail(key, fmt::format("an integer from {} to {}", low, high), Find(key)->dump());
    }
    return static_cast<int64_t>(*number);
  }
  int64_t RequiredInteger(const std::string& key, int64_t low, int64_t high) const {
    const auto value = Integer(key, low, high);
    if (!value) Fail(key, "an integer", "nothing");
    return *value;
  }
  bool Flag(const std::string& key, bool fallback) const {
    const OrderedJson* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) Fail(key, "true or false", value->dump());
    return value->get<bool>();
  }
  std::string Text(const std::string& key) const {
    const OrderedJson* value = Find(key);
    if (value == nullptr) return {};
    if (!value->is_string()) Fail(key, "a string", value->dump());
    return value->get<std::string>();
  }

 private:
  const OrderedJson& config_;
  std::string where_;
};

const Family& FamilyOf(const ConfigReader& reader, const std::string& where) {
  const std::string model_type = reader.Text("model_type");
  const Family* family = FindFamily(model_type);
  if (family != nullptr) return *family;
  std::string known;
  for (const Family* each : AllFamilies()) {
    known += fmt::format("{}{}", known.empty() ? "" : ", ", each->model_type);
  }
  throw ModelError(
      fmt::format("{}: model_type \"{}\" is not a family Winnow reads", where, model_type),
      fmt::format("known families: {}", known));
}

int64_t ReadExpertCount(const ConfigReader& reader, const Family& family) {
  std::optional<int64_t> count;
  std::string first_key;
  for (const char* key : kExpertCountKeys) {
    const auto value = reader.Integer(key, 0, 65536);
    if (!value) continue;
    if (count && *count != *value) {
      reader.Fail(key, fmt::format("{} as under \"{}\"", *count, first_key),
                  std::to_string(*value));
    }
    count = value;
    first_key = key;
  }
  if (!count) reader.Fail(std::string(family.num_experts_key), "the number of experts", "nothing");
  return *count;
}

RopeConfig ReadRope(const ConfigReader& reader, const OrderedJson& config, const Family& family,
                    const std::string& where) {
  RopeConfig rope;
  rope.theta = family.defaults.rope_theta;
  if (const auto theta = reader.Number("rope_theta")) rope.theta = *theta;
  // The newer dialect has everything in `rope_parameters`, the older one in `rope_scaling`.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const OrderedJson* object = reader.Find(key);
    if (object == nullptr) continue;
    if (!object->is_object()) reader.Fail(key, "an object", object->dump());
    const ConfigReader inner(*object, where + ": " + key);
    if (const auto theta = inner.Number("rope_theta")) rope.theta = *theta;
    std::string type = inner.Text("rope_type");
    if (type.empty()) type = inner.Text("type");
    if (type.empty() || type == "default") continue;
    if (type != "linear") {
      throw ModelError(fmt::format("{}: RoPE scaling \"{}\" is not supported for {}", where, type,
                                   family.model_type),
                       "remove the scaling from a copy of config.json to work within the "
                       "original context length");
    }
    rope.linear_factor = inner.Number("factor").value_or(1.0);
    if (!(rope.linear_factor > 0)) inner.Fail("factor", "a number above 0", "something else");
  }
  if (!(rope.theta > 0)) reader.Fail("rope_theta", "a number above 0", std::to_string(rope.theta));
  const double rotary = reader.Number("partial_rotary_factor").value_or(1.0);
  if (rotary != 1.0)
    reader.Fail("partial_rotary_factor", "1.0", config["partial_rotary_factor"].dump());
  return rope;
}

bool HasBias(const ConfigReader& reader, BiasRule rule) {
  switch (rule) {
    case BiasRule::kNever:
      return false;
    case BiasRule::kUnlessQkvBiasFalse:
      return reader.Flag("qkv_bias", true);
    case BiasRule::kIfAttentionBias:
      return reader.Flag("attention_bias", false);
  }
  return false;
}

void ReadAttention(const ConfigReader& reader, const Family& family, ModelConfig& out) {
  out.num_heads = reader.RequiredInteger("num_attention_heads", 1, kMaxDimension);
  const int64_t default_kv_heads =
      family.defaults.num_key_value_heads > 0 ? family.defaults.num_key_value_heads : out.num_heads;
  out.num_kv_heads =
      reader.Integer("num_key_value_heads", 1, kMaxDimension).value_or(default_kv_heads);
  if (out.num_heads % out.num_kv_heads != 0) {
    reader.Fail("num_key_value_heads", fmt::format("a divisor of {} heads", out.num_heads),
                std::to_string(out.num_kv_heads));
  }
  if (const auto head_dim = reader.Integer("head_dim", 1, 65536)) {
    out.head_dim = *head_dim;
  } else if (out.hidden_size % out.num_heads != 0) {
    reader.Fail("num_attention_heads",
                fmt::format("a divisor of hidden_size {} (there is no head_dim)", out.hidden_size),
                std::to_string(out.num_heads));
  } else {
    out.head_dim = out.hidden_size / out.num_heads;
  }
  if (out.head_dim % 2 != 0)
    reader.Fail("head_dim", "an even number", std::to_string(out.head_dim));
  out.qkv_bias = HasBias(reader, family.qkv_bias);
  out.output_bias = HasBias(reader, family.output_bias);
  out.qk_norm = family.qk_norm;
  if (family.reads_clip_qkv) {
    if (const auto clip = reader.Number("clip_qkv")) {
      if (!(*clip > 0 && *clip < 1e30)) {
        reader.Fail("clip_qkv", "a number above 0", std::to_string(*clip));
      }
      out.clip_qkv = static_cast<float>(*clip);
    }
  }
  if (family.sliding_window_by_value) {
    out.attention_window = reader.Integer("sliding_window", 1, int64_t{1} << 40).value_or(0);
  } else if (reader.Flag("use_sliding_window", false)) {
    reader.Fail("use_sliding_window", "false (which layers slide differs between versions)",
                "true");
  }
}

std::vector<int64_t> ReadIndexList(const ConfigReader& reader, const std::string& key) {
  std::vector<int64_t> list;
  const OrderedJson* value = reader.Find(key);
  if (value == nullptr) return list;
  if (!value->is_array()) reader.Fail(key, "a list of layer numbers", value->dump());
  for (const OrderedJson& item : *value) {
    if (!item.is_number_integer()) reader.Fail(key, "a list of layer numbers", value->dump());
    list.push_back(item.get<int64_t>());
  }
  return list;
}

void ReadLayers(const ConfigReader& reader, const Family& family, ModelConfig& out) {
  const int64_t num_layers = reader.RequiredInteger("num_hidden_layers", 1, kMaxLayers);
  const int64_t num_experts = ReadExpertCount(reader, family);
  const int64_t expert_width =
      reader.RequiredInteger(std::string(family.expert_width_key), 1, kMaxDimension);
  int64_t shared_width = 0;
  if (family.shared_expert == SharedExpert::kWidthKey) {
    shared_width = reader.RequiredInteger(std::string(family.shared_width_key), 0, kMaxDimension);
    out.shared_expert_gated = true;
  } else if (family.shared_expert == SharedExpert::kMultipleOfExpert) {
    shared_width =
        reader.Integer(std::string(family.shared_width_key), 0, 4096).value_or(0) * expert_width;
  }
  const std::vector<int64_t> dense_layers = ReadIndexList(reader, "mlp_only_layers");
  const int64_t step = reader.Integer("decoder_sparse_step", 1, kMaxLayers).value_or(1);
  const int64_t first_dense = reader.Integer("first_k_dense_replace", 0, kMaxLayers).value_or(0);
  const int64_t frequency = reader.Integer("moe_layer_freq", 1, kMaxLayers).value_or(1);
  for (int64_t i = 0; i < num_layers; ++i) {
    LayerConfig layer;
    switch (family.moe_layers) {
      case MoeLayerRule::kEveryLayer:
        layer.is_moe = true;
        break;
      case MoeLayerRule::kSparseStep:
        layer.is_moe = num_experts > 0 && (i + 1) % step == 0 &&
                       std::find(dense_layers.begin(), dense_layers.end(), i) == dense_layers.end();
        break;
      case MoeLayerRule::kFirstDense:
        layer.is_moe = num_experts > 0 && i >= first_dense && i % frequency == 0;
        break;
    }
    if (layer.is_moe) {
      layer.num_experts = num_experts;
      layer.expert_width = expert_width;
      layer.shared_width = shared_width;
    } else {
      layer.dense_width = reader.RequiredInteger("intermediate_size", 1, kMaxDimension);
    }
    out.layers.push_back(layer);
  }
  const int64_t fallback = family.defaults.num_experts_per_tok;
  const auto per_token = reader.Integer("num_experts_per_tok", 1, 65536);
  if (!per_token && fallback == 0) reader.Fail("num_experts_per_tok", "an integer", "nothing");
  out.num_experts_per_tok = per_token.value_or(fallback);
  if (!out.MoeLayers().empty() && out.num_experts_per_tok > num_experts) {
    reader.Fail("num_experts_per_tok", fmt::format("at most the {} experts there are", num_experts),
                std::to_string(out.num_experts_per_tok));
  }
}

constexpr const char* kExpertsPerLayer = "num_experts_per_layer";

// Our extension for layers of different sizes: a list over all decoder layers.
void ReadExpertsPerLayer(const ConfigReader& reader, ModelConfig& out) {
  const OrderedJson* list = reader.Find(kExpertsPerLayer);
  if (list == nullptr || list->is_null()) return;
  if (!list->is_array() || std::ssize(*list) != out.num_layers()) {
    reader.Fail(kExpertsPerLayer, fmt::format("a list of {} numbers", out.num_layers()),
                list->is_array() ? fmt::format("{} numbers", list->size()) : list->dump());
  }
  for (size_t i = 0; i < list->size(); ++i) {
    const OrderedJson& count = (*list)[i];
    LayerConfig& layer = out.layers[i];
    if (layer.is_condensed) continue;  // its own entry says how many are left
    const int64_t least = layer.is_moe ? out.num_experts_per_tok : 0;
    if (!count.is_number_integer() || count.get<int64_t>() < least ||
        count.get<int64_t>() > layer.num_experts) {
      reader.Fail(kExpertsPerLayer,
                  fmt::format("{} to {} experts in layer {}", least, layer.num_experts, i),
                  count.dump());
    }
    layer.num_experts = count.get<int64_t>();
  }
}

// A key of an object whose keys are decoder layers; -1 if it is none.
int64_t LayerOfKey(const std::string& key, const ModelConfig& out) {
  int64_t layer = -1;
  const auto [end, problem] = std::from_chars(key.data(), key.data() + key.size(), layer);
  const bool whole = problem == std::errc() && end == key.data() + key.size();
  return whole && layer >= 0 && layer < out.num_layers() ? layer : -1;
}

constexpr const char* kCondensedLayers = "condensed_layers";
constexpr const char* kExpertAlphas = "expert_alphas";
constexpr const char* kDenseWidth = "dense_width";

// Our extension: what is left of layers without a router, by decoder layer.
void ReadCondensedLayers(const ConfigReader& reader, ModelConfig& out) {
  const OrderedJson* condensed = reader.Find(kCondensedLayers);
  if (condensed == nullptr) return;
  if (!condensed->is_object()) {
    reader.Fail(kCondensedLayers, "an object of layer indices", condensed->dump());
  }
  for (const auto& [key, entry] : condensed->items()) {
    const int64_t index = LayerOfKey(key, out);
    if (index < 0 || !out.layers[static_cast<size_t>(index)].is_moe) {
      reader.Fail(kCondensedLayers, "indices of layers that had experts", key);
    }
    LayerConfig& layer = out.layers[static_cast<size_t>(index)];
    const bool apart = entry.is_object() && entry.contains(kExpertAlphas);
    const bool fused = entry.is_object() && entry.contains(kDenseWidth);
    if (apart == fused || entry.size() != 1) {
      reader.Fail(kCondensedLayers, "expert_alphas or dense_width for each layer", entry.dump());
    }
    layer.is_moe = false;
    layer.is_condensed = true;
    if (fused) {
      const OrderedJson& width = entry[kDenseWidth];
      if (!width.is_number_integer() || width.get<int64_t>() < 1 ||
          width.get<int64_t>() > kMaxDimension) {
        reader.Fail(kDenseWidth, "a width", width.dump());
      }
      layer.dense_width = width.get<int64_t>();
      layer.num_experts = 0;
      if (!out.shared_expert_gated) layer.shared_width = 0;  // it is a part of the fused matrices
      continue;
    }
    const OrderedJson& alphas = entry[kExpertAlphas];
    // Not bounded by the experts of other layers, which may have been pruned since.
    if (!alphas.is_array() || alphas.size() > 65536) {
      reader.Fail(kExpertAlphas, "a list of numbers", alphas.dump());
    }
    for (const OrderedJson& alpha : alphas) {
      if (!alpha.is_number() || !(std::abs(alpha.get<double>()) <= 1e6)) {
        reader.Fail(kExpertAlphas, "finite numbers", alpha.dump());
      }
      layer.expert_alphas.push_back(alpha.get<double>());
    }
    layer.num_experts = std::ssize(layer.expert_alphas);
    if (layer.num_experts == 0 && layer.shared_width == 0) {
      reader.Fail(kExpertAlphas, "at least one expert where none is shared", alphas.dump());
    }
  }
}

// NAEE's extension: {"0": 0.51, ...} by decoder layer.
void ReadBetas(const ConfigReader& reader, ModelConfig& out) {
  const OrderedJson* betas = reader.Find("betas");
  if (betas == nullptr || betas->is_null()) return;
  if (!betas->is_object()) reader.Fail("betas", "an object of layer indices", betas->dump());
  for (const auto& [key, value] : betas->items()) {
    const int64_t layer = LayerOfKey(key, out);
    if (layer < 0 || !out.layers[static_cast<size_t>(layer)].is_moe) {
      reader.Fail("betas", "indices of layers with experts", key);
    }
    if (!value.is_number() || !(value.get<double>() >= 0 && value.get<double>() <= 1)) {
      reader.Fail("betas", "numbers from 0 to 1", value.dump());
    }
    out.layers[static_cast<size_t>(layer)].skip_beta = value.get<double>();
  }
}

void ReadTokenIds(const ConfigReader& reader, ModelConfig& out) {
  if (const OrderedJson* eos = reader.Find("eos_token_id"); eos != nullptr && eos->is_array()) {
    for (const int64_t id : ReadIndexList(reader, "eos_token_id")) {
      if (id >= 0 && id < out.vocab_size) out.eos_token_ids.push_back(static_cast<int32_t>(id));
    }
  } else if (const auto id = reader.Integer("eos_token_id", -1, INT32_MAX); id && *id >= 0) {
    out.eos_token_ids.push_back(static_cast<int32_t>(*id));
  }
  if (const auto id = reader.Integer("bos_token_id", -1, INT32_MAX); id && *id >= 0) {
    out.bos_token_id = static_cast<int32_t>(*id);
  }
}

}  // namespace

std::vector<int32_t> ModelConfig::MoeLayers() const {
  std::vector<int32_t> result;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].is_moe) result.push_back(static_cast<int32_t>(i));
  }
  return result;
}

bool ModelConfig::has_packed_experts() const {
  return std::any_of(layers.begin(), layers.end(), [](const LayerConfig& layer) {
    if (!layer.formats.shared.empty()) return true;
    return std::any_of(layer.formats.experts.begin(), layer.formats.experts.end(),
                       [](const PackedFormat& format) { return !format.empty(); });
  });
}

bool ModelConfig::is_packed() const {
  return !lm_head_format.empty() || has_packed_experts() ||
         std::any_of(layers.begin(), layers.end(), [](const LayerConfig& layer) {
           const LayerFormats& f = layer.formats;
           return !f.attention.empty() || !f.dense.empty();
         });
}

std::optional<int64_t> ModelConfig::UniformExperts() const {
  std::optional<int64_t> count;
  for (const LayerConfig& layer : layers) {
    if (!layer.is_moe) continue;
    if (count && *count != layer.num_experts) return std::nullopt;
    count = layer.num_experts;
  }
  return count;
}

ModelConfig ParseModelConfig(const OrderedJson& config, const std::string& where) {
  const ConfigReader reader(config, where);
  const Family& family = FamilyOf(reader, where);
  ModelConfig out;
  out.family = &family;
  out.vocab_size = reader.RequiredInteger("vocab_size", 1, kMaxDimension);
  out.hidden_size = reader.RequiredInteger("hidden_size", 1, kMaxDimension);
  out.max_position_embeddings =
      reader.Integer("max_position_embeddings", 1, int64_t{1} << 40).value_or(0);
  const double eps = reader.Number("rms_norm_eps").value_or(family.defaults.rms_norm_eps);
  if (!(eps >= 0 && eps <= 1)) reader.Fail("rms_norm_eps", "0 to 1", std::to_string(eps));
  out.rms_norm_eps = static_cast<float>(eps);
  const std::string activation = reader.Text("hidden_act");
  if (!activation.empty() && activation != "silu") {
    reader.Fail("hidden_act", "\"silu\"", activation);
  }
  const std::string scoring = reader.Text("scoring_func");
  if (!scoring.empty() && scoring != "softmax") reader.Fail("scoring_func", "\"softmax\"", scoring);
  ReadAttention(reader, family, out);
  out.rope = ReadRope(reader, config, family, where);
  out.norm_topk_prob =
      family.normalize_topk == NormalizeTopk::kAlways || reader.Flag("norm_topk_prob", false);
  out.normalize_epsilon = family.normalize_epsilon;
  ReadLayers(reader, family, out);
  ReadCondensedLayers(reader, out);
  ReadExpertsPerLayer(reader, out);
  ReadBetas(reader, out);
  out.tie_word_embeddings = reader.Flag("tie_word_embeddings", false);
  out.stored_dtype = reader.Text("dtype");
  if (out.stored_dtype.empty()) out.stored_dtype = reader.Text("torch_dtype");
  ReadTokenIds(reader, out);
  ReadQuantizationConfig(config, where, out);
  return out;
}

void CheckTokenIds(std::span<const int32_t> ids, const ModelConfig& config) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= config.vocab_size) {
      throw UsageError(fmt::format("token id {} is outside the model's {} embedding rows", id,
                                   config.vocab_size),
                       "the ids were made with another tokenizer or another model");
    }
  }
}

OrderedJson ConfigWithBetas(const OrderedJson& config, const std::vector<double>& betas) {
  OrderedJson edited = config;
  edited.erase("betas");
  OrderedJson map = OrderedJson::object();
  for (size_t layer = 0; layer < betas.size(); ++layer) {
    if (betas[layer] > 0) map[std::to_string(layer)] = betas[layer];
  }
  if (!map.empty()) edited["betas"] = map;
  return edited;
}

OrderedJson ConfigWithCondensedLayers(const OrderedJson& config,
                                      const std::vector<CondensedLayer>& layers) {
  OrderedJson edited = config;
  if (layers.empty()) return edited;
  OrderedJson& entries = edited[kCondensedLayers];
  if (!entries.is_object()) entries = OrderedJson::object();
  for (const CondensedLayer& layer : layers) {
    OrderedJson entry = OrderedJson::object();
    if (layer.dense_width > 0) {
      entry[kDenseWidth] = layer.dense_width;
    } else {
      entry[kExpertAlphas] = layer.expert_alphas;
    }
    entries[std::to_string(layer.layer)] = entry;
  }
  return edited;
}

int64_t StockDenseWidth(const ModelConfig& parsed, int64_t widest) {
  for (const LayerConfig& layer : parsed.layers) {
    if (!layer.is_moe && !layer.is_condensed) return layer.dense_width;
  }
  return widest;
}

OrderedJson ConfigWithDenseLayers(const OrderedJson& config, const ModelConfig& parsed,
                                  const std::vector<int32_t>& layers, int64_t dense_width) {
  OrderedJson edited = config;
  const std::string type(parsed.family->model_type);
  const auto is_dense = [&](int64_t layer) {
    return !parsed.layers[static_cast<size_t>(layer)].is_moe ||
           std::find(layers.begin(), layers.end(), layer) != layers.end();
  };
  if (config.contains(kCondensedLayers)) {
    throw UsageError("the model has condensed layers in Winnow's own form already",
                     "condense the original model");
  }
  switch (parsed.family->moe_layers) {
    case MoeLayerRule::kEveryLayer:
      throw UsageError(
          fmt::format("a {} model has experts in every layer: its config cannot say that "
                      "a layer is dense",
                      type),
          "leave --stock out; --export-code brings code for transformers");
    case MoeLayerRule::kSparseStep: {
      OrderedJson& list = edited["mlp_only_layers"];
      std::vector<int64_t> dense;
      if (list.is_array()) dense = list.get<std::vector<int64_t>>();
      dense.insert(dense.end(), layers.begin(), layers.end());
      std::sort(dense.begin(), dense.end());
      dense.erase(std::unique(dense.begin(), dense.end()), dense.end());
      list = dense;
      break;
    }
    case MoeLayerRule::kFirstDense: {
      int64_t first = 0;
      while (first < parsed.num_layers() && is_dense(first)) ++first;
      for (int64_t layer = first; layer < parsed.num_layers(); ++layer) {
        if (is_dense(layer)) {
          throw UsageError(
              fmt::format("the config of a {} model can say that its first layers are dense, but "
                          "not layer {} after layer {}",
                          type, layer, first),
              "condense the first MoE layers (--moe-layers 0,1,..), or leave --stock out");
        }
      }
      edited["first_k_dense_replace"] = first;
      break;
    }
  }
  edited["intermediate_size"] = dense_width;
  return edited;
}

OrderedJson ConfigWithExpertsPerLayer(const OrderedJson& config, const Family& family,
                                      const std::vector<int64_t>& num_experts) {
  OrderedJson edited =
      ConfigWithExperts(config, family, *std::max_element(num_experts.begin(), num_experts.end()));
  edited[kExpertsPerLayer] = num_experts;
  return edited;
}

OrderedJson ConfigWithExperts(const OrderedJson& config, const Family& family,
                              int64_t num_experts) {
  OrderedJson edited = config;
  edited.erase(kExpertsPerLayer);
  bool found = false;
  for (const char* key : kExpertCountKeys) {
    const auto it = edited.find(key);
    if (it == edited.end() || it->is_null()) continue;
    *it = num_experts;
    found = true;
  }
  if (!found) edited[std::string(family.num_experts_key)] = num_experts;
  return edited;
}

}  // namespace winnow
