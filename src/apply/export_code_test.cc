#include "apply/export_code.h"

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

namespace winnow {
namespace {

TEST(ExportCode, TextIsTheSourceFile) {
  std::ifstream file(WINNOW_SOURCE_DIR "/src/apply/modeling_winnow.py");
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_GT(ModelingCode().size(), 10000u);
  EXPECT_EQ(ModelingCode(), text.str());
}

TEST(ExportCode, ConfigNamesTheClassesAndKeepsTheRest) {
  const OrderedJson config = OrderedJson::parse(R"({
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig",
                 "AutoModel": "modeling_deepseek.DeepseekModel",
                 "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
                 "AutoTokenizer": ["tokenization_x.X", null]},
    "model_type": "deepseek", "betas": {"1": 0.5}})");
  const OrderedJson plain = ConfigWithModelingCode(config);
  EXPECT_EQ(plain["auto_map"], OrderedJson::parse(R"({"AutoTokenizer": ["tokenization_x.X", null],
                                   "AutoConfig": "modeling_winnow.WinnowConfig",
                                   "AutoModelForCausalLM": "modeling_winnow.WinnowForCausalLM"})"));
  // A library that ignores the thresholds still runs the model, with every expert.
  EXPECT_EQ(plain["architectures"], config["architectures"]);
  EXPECT_FALSE(plain.contains("transformers_weights"));
  EXPECT_EQ(plain["model_type"], "deepseek");
  EXPECT_EQ(plain["betas"], config["betas"]);
  EXPECT_EQ(ConfigWithModelingCode(plain), plain);
}

TEST(ExportCode, OnlyOurClassLoadsWhatOthersCannot) {
  for (const char* key : {"condensed_layers", "num_experts_per_layer"}) {
    OrderedJson config = OrderedJson::parse(R"({"model_type": "olmoe"})");
    config[key] = nullptr;
    EXPECT_FALSE(ConfigWithModelingCode(config).contains("transformers_weights"));
    config[key] = OrderedJson::object();
    const OrderedJson edited = ConfigWithModelingCode(config);
    EXPECT_EQ(edited["architectures"], OrderedJson::array({"WinnowForCausalLM"}));
    EXPECT_TRUE(edited.contains("transformers_weights"));
    EXPECT_EQ(edited["model_type"], "olmoe");
  }
}

}  // namespace
}  // namespace winnow
