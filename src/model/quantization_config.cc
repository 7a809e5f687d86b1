#include "model/quantization_config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <initializer_list>
#include <string_view>

#include "base/error.h"

namespace winnow {
namespace {

constexpr const char* kSection = "quantization_config";
constexpr const char* kMethod = "winnow";
constexpr int64_t kVersion = 2;

// Values in messages stay short whatever a file holds.
std::string Shown(const OrderedJson& value) {
  std::string text = value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

class SectionReader {
 public:
  SectionReader(const OrderedJson& section, const std::string& where, ModelConfig& out)
      : section_(section), where_(where), out_(out) {}

  void Read() {
    CheckMethod();
    CheckKeys(section_, "", {"quant_method", "version", "layers", "lm_head"});
    const auto layers = section_.find("layers");
    if (layers == section_.end() || !layers->is_array() ||
        std::ssize(*layers) != out_.num_layers()) {
      Fail("layers", fmt::format("a list of {} objects, one for each layer", out_.num_layers()),
           layers == section_.end() ? "nothing"
           : layers->is_array()     ? fmt::format("{} entries", layers->size())
                                    : Shown(*layers));
    }
    for (size_t i = 0; i < layers->size(); ++i) {
      ReadLayer(fmt::format("layers[{}]", i), (*layers)[i], out_.layers[i]);
    }
    if (const auto head = section_.find("lm_head"); head != section_.end()) {
      if (out_.tie_word_embeddings) {
        Fail("lm_head", "nothing, because the embedding is used (tie_word_embeddings)",
             Shown(*head));
      }
      out_.lm_head_format = Format("lm_head", *head);
    }
  }

 private:
  [[noreturn]] void Fail(const std::string& key, const std::string& expected,
                         const std::string& got) const {
    throw ModelError(
        fmt::format("{}: {}: \"{}\": expected {}, got {}", where_, kSection, key, expected, got),
        "the file was changed since winnow wrote it; quantise the original model again");
  }

  void CheckMethod() const {
    const auto method = section_.find("quant_method");
    const bool named = method != section_.end() && method->is_string();
    if (!named || method->get<std::string>() != kMethod) {
      throw ModelError(
          fmt::format("{}: quantised weights ({}) are not supported", where_,
                      named ? Shown(*method) : "no quant_method is given"),
          "use the checkpoint in bfloat16, float16 or float32; `winnow quantize` packs it");
    }
    const auto version = section_.find("version");
    const bool number = version != section_.end() && version->is_number_integer();
    if (!number || version->get<int64_t>() != kVersion) {
      throw ModelError(
          fmt::format("{}: {}: version {} of the packed format is not supported, only {} is",
                      where_, kSection, version == section_.end() ? "(none)" : Shown(*version),
                      kVersion),
          "another version of winnow wrote it: use that one, or quantise the original again");
    }
  }

  void CheckKeys(const OrderedJson& object, const std::string& what,
                 std::initializer_list<std::string_view> known) const {
    for (const auto& [key, value] : object.items()) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      Fail(what.empty() ? key : what, fmt::format("the keys {}", fmt::join(known, ", ")),
           Shown(key));
    }
  }

  PackedFormat Format(const std::string& key, const OrderedJson& value) const {
    const auto format =
        value.is_string() ? PackedFormatFromName(value.get<std::string>()) : std::nullopt;
    if (!format) Fail(key, "a packed format such as \"4bit\" or \"3bit-asym-g64\"", Shown(value));
    return *format;
  }

  void ReadLayer(const std::string& key, const OrderedJson& entry, LayerConfig& layer) const {
    if (!entry.is_object()) Fail(key, "an object", Shown(entry));
    CheckKeys(entry, key, {"experts", "attention", "shared", "dense"});
    const auto one = [&](const char* part, bool exists, PackedFormat& format) {
      const auto value = entry.find(part);
      if (value == entry.end()) return;
      if (!exists) Fail(key, fmt::format("no \"{}\", which the layer lacks", part), Shown(*value));
      format = Format(fmt::format("{}.{}", key, part), *value);
    };
    one("attention", true, layer.formats.attention);
    one("shared", layer.shared_width > 0, layer.formats.shared);
    one("dense", layer.dense_width > 0, layer.formats.dense);
    if (const auto experts = entry.find("experts"); experts != entry.end()) {
      ReadExperts(key + ".experts", *experts, layer);
    }
  }

  // One name for all, or a list of names and, for experts that are not packed, null.
  void ReadExperts(const std::string& key, const OrderedJson& value, LayerConfig& layer) const {
    if (layer.num_experts == 0) Fail(key, "nothing, because the layer has none", Shown(value));
    const auto count = static_cast<size_t>(layer.num_experts);
    if (!value.is_array()) {
      layer.formats.experts.assign(count, Format(key, value));
      return;
    }
    if (value.size() != count) {
      Fail(key, fmt::format("{} formats, one for each expert", count),
           fmt::format("{}", value.size()));
    }
    for (const OrderedJson& each : value) {
      layer.formats.experts.push_back(each.is_null() ? PackedFormat{} : Format(key, each));
    }
  }

  const OrderedJson& section_;
  const std::string& where_;
  ModelConfig& out_;
};

OrderedJson ExpertNames(const std::vector<PackedFormat>& experts) {
  const bool same = std::all_of(experts.begin(), experts.end(),
                                [&](const PackedFormat& f) { return f == experts.front(); });
  if (same) return PackedFormatName(experts.front());
  OrderedJson names = OrderedJson::array();
  for (const PackedFormat& format : experts) {
    names.push_back(format.empty() ? OrderedJson() : OrderedJson(PackedFormatName(format)));
  }
  return names;
}

bool AnyPacked(const std::vector<PackedFormat>& experts) {
  return std::any_of(experts.begin(), experts.end(),
                     [](const PackedFormat& format) { return !format.empty(); });
}

}  // namespace

void ReadQuantizationConfig(const OrderedJson& config, const std::string& where, ModelConfig& out) {
  const auto section = config.find(kSection);
  if (section == config.end() || section->is_null()) return;
  if (!section->is_object()) {
    throw ModelError(
        fmt::format("{}: \"{}\": expected an object, got {}", where, kSection, Shown(*section)),
        "compare the file with the published one of this model");
  }
  SectionReader(*section, where, out).Read();
}

OrderedJson ConfigWithFormats(const OrderedJson& config, const std::vector<LayerFormats>& layers,
                              const PackedFormat& lm_head) {
  OrderedJson edited = config;
  edited.erase(kSection);
  bool any = !lm_head.empty();
  OrderedJson entries = OrderedJson::array();
  for (const LayerFormats& layer : layers) {
    OrderedJson entry = OrderedJson::object();
    if (AnyPacked(layer.experts)) entry["experts"] = ExpertNames(layer.experts);
    if (!layer.attention.empty()) entry["attention"] = PackedFormatName(layer.attention);
    if (!layer.shared.empty()) entry["shared"] = PackedFormatName(layer.shared);
    if (!layer.dense.empty()) entry["dense"] = PackedFormatName(layer.dense);
    any = any || !entry.empty();
    entries.push_back(entry);
  }
  if (!any) return edited;
  OrderedJson section = {{"quant_method", kMethod}, {"version", kVersion}, {"layers", entries}};
  if (!lm_head.empty()) section["lm_head"] = PackedFormatName(lm_head);
  edited[kSection] = section;
  return edited;
}

}  // namespace winnow
