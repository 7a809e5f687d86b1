// config.json as bytes: either refused with a ModelError, or a config whose numbers can be relied
// on.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/model_config.h"
#include "model/quantization_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  try {
    const OrderedJson json =
        ParseOrderedJson(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz");
    const ModelConfig config = ParseModelConfig(json, "fuzz");
    if (config.hidden_size < 1 || config.vocab_size < 1 || config.layers.empty()) std::abort();
    if (config.head_dim < 2 || config.head_dim % 2 != 0) std::abort();
    if (config.num_kv_heads < 1 || config.num_heads % config.num_kv_heads != 0) std::abort();
    if (!(config.rope.theta > 0) || !(config.rms_norm_eps >= 0)) std::abort();
    if (config.attention_window < 0 || (config.clip_qkv && !(*config.clip_qkv > 0))) std::abort();
    for (const LayerConfig& layer : config.layers) {
      // A condensed layer has something left, be it its shared expert.
      const int64_t left = layer.dense_width + layer.num_experts + layer.shared_width;
      if (!layer.is_moe && (layer.is_condensed ? left : layer.dense_width) < 1) std::abort();
      if (!layer.is_moe) continue;
      if (layer.expert_width < 1 || layer.shared_width < 0) std::abort();
      if (config.num_experts_per_tok < 1 || layer.num_experts < config.num_experts_per_tok) {
        std::abort();
      }
    }
    // Formats fit their layers, and read back as what was written.
    std::vector<LayerFormats> formats;
    for (const LayerConfig& layer : config.layers) {
      const size_t experts = layer.formats.experts.size();
      if (experts != 0 && experts != static_cast<size_t>(layer.num_experts)) std::abort();
      formats.push_back(layer.formats);
    }
    const ModelConfig again =
        ParseModelConfig(ConfigWithFormats(json, formats, config.lm_head_format), "fuzz");
    if (again.is_packed() != config.is_packed()) std::abort();
    for (size_t l = 0; config.is_packed() && l < formats.size(); ++l) {
      const LayerFormats& read = again.layers[l].formats;
      if (read.attention != formats[l].attention || read.shared != formats[l].shared ||
          read.dense != formats[l].dense) {
        std::abort();
      }
      for (size_t e = 0; e < formats[l].experts.size(); ++e) {
        if (read.Expert(e) != formats[l].experts[e]) std::abort();
      }
    }
    if (config.MoeLayers().empty()) return 0;
    // What apply/ writes for fewer experts is accepted and says so.
    const int64_t keep = config.num_experts_per_tok;
    const ModelConfig pruned =
        ParseModelConfig(ConfigWithExperts(json, *config.family, keep), "fuzz");
    if (pruned.UniformExperts() != keep || pruned.MoeLayers() != config.MoeLayers()) std::abort();
  } catch (const ModelError&) {
  }
  return 0;
}
