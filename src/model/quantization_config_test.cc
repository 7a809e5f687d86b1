#include "model/quantization_config.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "model/test_support.h"

namespace winnow {
namespace {

OrderedJson Section(const OrderedJson& layers) {
  return {{"quant_method", "winnow"}, {"version", 2}, {"layers", layers}};
}

OrderedJson Layers(size_t count, const OrderedJson& each = OrderedJson::object()) {
  OrderedJson layers = OrderedJson::array();
  for (size_t i = 0; i < count; ++i) layers.push_back(each);
  return layers;
}

// Three layers of six experts, untied; qwen2_moe has a shared expert, and its second layer none.
ModelConfig Parse(const OrderedJson& section, const std::string& name = "mixtral") {
  OrderedJson config = ReadConfig(GoldenFolder(name));
  config["quantization_config"] = section;
  return ParseModelConfig(config, "config.json");
}

void ExpectRefused(const OrderedJson& section, const std::string& part,
                   const std::string& name = "mixtral") {
  try {
    Parse(section, name);
    ADD_FAILURE() << section.dump() << " was read";
  } catch (const ModelError& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    EXPECT_FALSE(error.hint().empty()) << error.what();
  }
}

TEST(QuantizationConfig, FormatsAreReadByLayer) {
  OrderedJson layers = Layers(3);
  const auto experts = static_cast<size_t>(Parse(Section(Layers(3))).layers.front().num_experts);
  layers[0] = {{"experts", "4bit"}, {"attention", "8bit"}};
  OrderedJson mixed = OrderedJson::array();
  for (size_t e = 0; e < experts; ++e) mixed.push_back("3bit-asym-g64");
  mixed[1] = nullptr;
  layers[2] = {{"experts", mixed}};
  OrderedJson section = Section(layers);
  section["lm_head"] = "6bit-g128";
  const ModelConfig config = Parse(section);
  EXPECT_EQ(config.layers[0].formats.experts,
            std::vector<PackedFormat>(experts, *PackedFormatFromName("4bit")));
  EXPECT_EQ(config.layers[0].formats.attention, *PackedFormatFromName("8bit"));
  EXPECT_EQ(config.layers[1].formats, LayerFormats{});
  EXPECT_TRUE(config.layers[2].formats.experts[1].empty());
  EXPECT_EQ(config.layers[2].formats.experts[0], *PackedFormatFromName("3bit-asym-g64"));
  EXPECT_EQ(config.lm_head_format, *PackedFormatFromName("6bit-g128"));
  EXPECT_TRUE(config.is_packed());
  EXPECT_TRUE(config.has_packed_experts());

  // What is written reads back as the same, and says nothing of what is not packed.
  std::vector<LayerFormats> formats;
  for (const LayerConfig& layer : config.layers) formats.push_back(layer.formats);
  const OrderedJson original = ReadConfig(GoldenFolder("mixtral"));
  const OrderedJson written = ConfigWithFormats(original, formats, config.lm_head_format);
  EXPECT_EQ(written["quantization_config"].dump(), section.dump());
  EXPECT_EQ(ConfigWithFormats(written, std::vector<LayerFormats>(3), {}).dump(), original.dump());
}

TEST(QuantizationConfig, NothingPackedIsNoPackedModel) {
  EXPECT_FALSE(Parse(Section(Layers(3))).is_packed());
  EXPECT_FALSE(Parse(nullptr).is_packed());
}

TEST(QuantizationConfig, OtherMethodsAreRefusedByName) {
  for (const char* method : {"gptq", "awq", "fp8", "bitsandbytes", "Winnow"}) {
    ExpectRefused({{"quant_method", method}, {"bits", 4}}, method);
  }
  ExpectRefused({{"bits", 4}}, "no quant_method");
  ExpectRefused({{"quant_method", 4}}, "no quant_method");
  ExpectRefused(OrderedJson::array(), "expected an object");
}

TEST(QuantizationConfig, WhatDoesNotFitIsRefused) {
  OrderedJson section = Section(Layers(3));
  section["version"] = 1;
  ExpectRefused(section, "version 1");
  section.erase("version");
  ExpectRefused(section, "version (none)");
  section = Section(Layers(3));
  section["group_size"] = 64;
  ExpectRefused(section, "group_size");
  section = Section(Layers(3));
  section.erase("layers");
  ExpectRefused(section, "3 objects");
  ExpectRefused(Section(Layers(2)), "3 objects, one for each layer, got 2 entries");
  ExpectRefused(Section("4bit"), "3 objects");
  ExpectRefused(Section(Layers(3, "4bit")), "layers[0]");
  ExpectRefused(Section(Layers(3, {{"router", "8bit"}})), "router");
  for (const char* name : {"", "4", "9bit", "1bit", "8bit-log", "4bit-g16", "4bit-log-asym"}) {
    ExpectRefused(Section(Layers(3, {{"experts", name}})), "packed format");
    ExpectRefused(Section(Layers(3, {{"attention", name}})), "packed format");
  }
  ExpectRefused(Section(Layers(3, {{"experts", 4}})), "packed format");
  ExpectRefused(Section(Layers(3, {{"experts", nullptr}})), "packed format");
  ExpectRefused(Section(Layers(3, {{"experts", {"4bit", "4bit"}}})), "one for each expert, got 2");
  ExpectRefused(Section(Layers(3, {{"shared", "8bit"}})), "shared");  // mixtral has none
  ExpectRefused(Section(Layers(3, {{"dense", "8bit"}})), "dense");
  // The second layer is dense.
  const auto count = static_cast<size_t>(Parse(nullptr, "qwen3_moe-dense-layer").num_layers());
  ExpectRefused(Section(Layers(count, {{"experts", "4bit"}})), "layers[1]",
                "qwen3_moe-dense-layer");
  // A tied lm_head is the embedding, which is never packed.
  OrderedJson tied = ReadConfig(GoldenFolder("mixtral"));
  tied["tie_word_embeddings"] = true;
  section = Section(Layers(3));
  section["lm_head"] = "8bit";
  tied["quantization_config"] = section;
  EXPECT_THROW(ParseModelConfig(tied, "config.json"), ModelError);
}

}  // namespace
}  // namespace winnow
