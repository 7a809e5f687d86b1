// config.json of every family: dialects, defaults, aliases, and refusal of what is wrong or not
// supported.
#include "model/model_config.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "model/test_support.h"

namespace winnow {
namespace {

ModelConfig Parse(const OrderedJson& config) {
  return ParseModelConfig(config, "config.json");
}

OrderedJson Golden(const std::string& name) {
  return ReadConfig(GoldenFolder(name));
}

OrderedJson With(OrderedJson config, const char* key, const OrderedJson& value) {
  config[key] = value;
  return config;
}

OrderedJson Without(OrderedJson config, const char* key) {
  config.erase(key);
  return config;
}

// The message, which must name the key and say what is expected.
void ExpectRefused(const OrderedJson& config, const std::string& key) {
  const std::string message = ModelErrorOf([&] { Parse(config); });
  EXPECT_NE(message.find(key), std::string::npos) << message;
  EXPECT_NE(message.find("config.json"), std::string::npos) << message;
}

TEST(ModelConfig, ReadsMixtral) {
  const ModelConfig config = Parse(Golden("mixtral"));
  EXPECT_EQ(config.family->model_type, "mixtral");
  EXPECT_EQ(config.hidden_size, 64);
  EXPECT_EQ(config.vocab_size, 320);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.query_width(), 64);
  EXPECT_EQ(config.kv_width(), 32);
  EXPECT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.attention_window, 0);
  EXPECT_TRUE(config.norm_topk_prob);
  EXPECT_FALSE(config.qkv_bias);
  EXPECT_EQ(config.qk_norm, QkNorm::kNone);
  EXPECT_EQ(config.stored_dtype, "float32");
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int32_t>{2}));
  EXPECT_EQ(config.MoeLayers(), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(config.UniformExperts(), 6);
  EXPECT_EQ(config.layers[0].expert_width, 24);
  EXPECT_EQ(config.max_position_embeddings, 2048);
}

TEST(ModelConfig, ReadsTheOtherFamilies) {
  const ModelConfig qwen2 = Parse(Golden("qwen2_moe"));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.output_bias);
  EXPECT_FALSE(qwen2.norm_topk_prob);
  EXPECT_TRUE(qwen2.shared_expert_gated);
  EXPECT_EQ(qwen2.layers[1].shared_width, 40);
  EXPECT_EQ(qwen2.layers[1].expert_width, 16);
  EXPECT_EQ(qwen2.rope.theta, 1e6);
  EXPECT_EQ(qwen2.attention_window, 0);  // `sliding_window` without use_sliding_window
  const ModelConfig qwen3 = Parse(Golden("qwen3_moe-bf16"));
  EXPECT_EQ(qwen3.head_dim, 24);
  EXPECT_EQ(qwen3.qk_norm, QkNorm::kPerHead);
  EXPECT_TRUE(qwen3.norm_topk_prob);
  const ModelConfig dense = Parse(Golden("qwen3_moe-dense-layer"));
  EXPECT_EQ(dense.MoeLayers(), (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(dense.layers[1].dense_width, 48);
  EXPECT_EQ(dense.layers[1].num_experts, 0);
  EXPECT_EQ(dense.UniformExperts(), 6);
  const ModelConfig olmoe = Parse(Golden("olmoe"));
  EXPECT_EQ(olmoe.qk_norm, QkNorm::kWholeProjection);
  EXPECT_FALSE(olmoe.bos_token_id.has_value());
  EXPECT_FALSE(olmoe.clip_qkv.has_value());
  const ModelConfig deepseek = Parse(Golden("deepseek-bf16"));
  EXPECT_EQ(deepseek.MoeLayers(), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(deepseek.layers[0].dense_width, 48);
  EXPECT_EQ(deepseek.layers[1].shared_width, 32);  // two of 16
  EXPECT_FALSE(deepseek.shared_expert_gated);
}

// The newer dialect: `rope_parameters`, `dtype`, null head_dim, the aliased number of experts.
TEST(ModelConfig, ReadsBothDialects) {
  const ModelConfig newer = Parse(Golden("mixtral-bf16-sharded"));
  EXPECT_EQ(newer.head_dim, 16);
  EXPECT_EQ(newer.stored_dtype, "bfloat16");
  EXPECT_EQ(newer.rope.theta, 10000.0);
  OrderedJson config = Golden("mixtral");
  config["rope_parameters"] = {{"rope_theta", 5e5}, {"rope_type", "default"}};
  EXPECT_EQ(Parse(config).rope.theta, 5e5);
  config["rope_parameters"] = {{"rope_theta", 5e5}, {"rope_type", "linear"}, {"factor", 4.0}};
  EXPECT_EQ(Parse(config).rope.linear_factor, 4.0);
  config = With(Golden("mixtral"), "rope_scaling", {{"type", "linear"}, {"factor", 2}});
  EXPECT_EQ(Parse(config).rope.linear_factor, 2.0);
  EXPECT_EQ(Parse(config).rope.theta, 10000.0);
  for (const char* type : {"yarn", "llama3", "dynamic", "longrope"}) {
    ExpectRefused(With(Golden("mixtral"), "rope_scaling", {{"rope_type", type}, {"factor", 2}}),
                  type);
  }
  ExpectRefused(With(Golden("mixtral"), "rope_scaling", {{"type", "linear"}, {"factor", 0}}),
                "factor");
  ExpectRefused(With(Golden("mixtral"), "rope_scaling", "linear"), "rope_scaling");
  ExpectRefused(With(Golden("mixtral"), "rope_theta", 0), "rope_theta");
  ExpectRefused(With(Golden("qwen3_moe-bf16"), "partial_rotary_factor", 0.5), "partial_rotary");
}

TEST(ModelConfig, NullIsTheSameAsAbsent) {
  for (const char* name : {"mixtral", "qwen2_moe", "qwen3_moe-bf16", "olmoe", "deepseek-bf16"}) {
    const OrderedJson golden = Golden(name);
    for (const auto& [key, value] : golden.items()) {
      // Both accepted with the same meaning, or both refused.
      std::string absent, null;
      try {
        absent = std::to_string(Parse(Without(golden, key.c_str())).num_kv_heads);
      } catch (const ModelError& e) {
        absent = e.what();
      }
      try {
        null = std::to_string(Parse(With(golden, key.c_str(), nullptr)).num_kv_heads);
      } catch (const ModelError& e) {
        null = e.what();
      }
      EXPECT_EQ(absent, null) << name << " " << key;
    }
  }
}

// Values of keys that are not there, as the reference implementation's config classes have them.
TEST(ModelConfig, DefaultsAreTheFamilys) {
  OrderedJson mixtral = Golden("mixtral");
  for (const char* key : {"rope_theta", "rms_norm_eps", "num_experts_per_tok"}) mixtral.erase(key);
  EXPECT_EQ(Parse(mixtral).rope.theta, 1e6);
  EXPECT_EQ(Parse(mixtral).rms_norm_eps, 1e-5f);
  EXPECT_EQ(Parse(mixtral).num_experts_per_tok, 2);
  ExpectRefused(Without(Golden("mixtral"), "num_key_value_heads"), "num_key_value_heads");  // 8
  EXPECT_EQ(Parse(Without(Golden("olmoe"), "num_key_value_heads")).num_kv_heads, 4);
  EXPECT_EQ(Parse(Without(Golden("qwen2_moe"), "norm_topk_prob")).norm_topk_prob, false);
  ExpectRefused(Without(Golden("deepseek-bf16"), "num_experts_per_tok"), "num_experts_per_tok");
}

TEST(ModelConfig, NumberOfExpertsUnderEveryName) {
  for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts"}) {
    OrderedJson config = Without(Golden("mixtral"), "num_local_experts");
    ExpectRefused(config, "num_local_experts");
    config[key] = 6;
    EXPECT_EQ(Parse(config).UniformExperts(), 6) << key;
    config[key] = 6.0;  // as some writers spell integers
    EXPECT_EQ(Parse(config).UniformExperts(), 6) << key;
  }
  EXPECT_EQ(Parse(With(Golden("mixtral"), "num_experts", 6)).UniformExperts(), 6);
  ExpectRefused(With(Golden("mixtral"), "num_experts", 8), "num_experts");  // contradiction
}

TEST(ModelConfig, LayersWithoutExperts) {
  OrderedJson config = With(Golden("qwen2_moe"), "decoder_sparse_step", 2);
  EXPECT_EQ(Parse(config).MoeLayers(), (std::vector<int32_t>{1}));
  EXPECT_EQ(Parse(config).layers[0].dense_width, 40);
  config["mlp_only_layers"] = {1};
  EXPECT_EQ(Parse(config).MoeLayers(), (std::vector<int32_t>{}));
  EXPECT_EQ(Parse(config).UniformExperts(), std::nullopt);
  config = With(Golden("deepseek-bf16"), "moe_layer_freq", 2);
  EXPECT_EQ(Parse(config).MoeLayers(), (std::vector<int32_t>{2}));
  config["first_k_dense_replace"] = 0;
  EXPECT_EQ(Parse(config).MoeLayers(), (std::vector<int32_t>{0, 2}));
  ExpectRefused(With(Golden("qwen2_moe"), "decoder_sparse_step", 0), "decoder_sparse_step");
  ExpectRefused(With(Golden("qwen2_moe"), "mlp_only_layers", 1), "mlp_only_layers");
  ExpectRefused(With(Golden("qwen2_moe"), "mlp_only_layers", OrderedJson::array({"1"})),
                "mlp_only_layers");
}

TEST(ModelConfig, SlidingWindow) {
  EXPECT_EQ(Parse(With(Golden("mixtral"), "sliding_window", 4096)).attention_window, 4096);
  ExpectRefused(With(Golden("mixtral"), "sliding_window", 0), "sliding_window");
  ExpectRefused(With(Golden("mixtral"), "sliding_window", "wide"), "sliding_window");
  ExpectRefused(With(Golden("qwen2_moe"), "use_sliding_window", true), "use_sliding_window");
}

TEST(ModelConfig, ClipAndBiases) {
  EXPECT_EQ(Parse(With(Golden("olmoe"), "clip_qkv", 8.0)).clip_qkv, 8.0f);
  EXPECT_FALSE(Parse(With(Golden("mixtral"), "clip_qkv", 8.0)).clip_qkv.has_value());
  EXPECT_FALSE(Parse(With(Golden("qwen2_moe"), "qkv_bias", false)).qkv_bias);
  const ModelConfig biased = Parse(With(Golden("olmoe"), "attention_bias", true));
  EXPECT_TRUE(biased.qkv_bias && biased.output_bias);
}

TEST(ModelConfig, TokenIds) {
  EXPECT_EQ(Parse(With(Golden("mixtral"), "eos_token_id", {2, 5})).eos_token_ids,
            (std::vector<int32_t>{2, 5}));
  EXPECT_EQ(Parse(With(Golden("mixtral"), "eos_token_id", nullptr)).eos_token_ids.size(), 0u);
  EXPECT_EQ(Parse(With(Golden("mixtral"), "eos_token_id", {-1, 5})).eos_token_ids,
            (std::vector<int32_t>{5}));
  ExpectRefused(With(Golden("mixtral"), "eos_token_id", "</s>"), "eos_token_id");
  ExpectRefused(With(Golden("mixtral"), "bos_token_id", 1e20), "bos_token_id");
}

TEST(ModelConfig, RefusesWrongValues) {
  const OrderedJson good = Golden("mixtral");
  for (const char* key : {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                          "intermediate_size", "num_local_experts"}) {
    ExpectRefused(Without(good, key), key);
    for (const OrderedJson& value :
         {OrderedJson("64"), OrderedJson(-1), OrderedJson(2.5), OrderedJson(1e300),
          OrderedJson(true), OrderedJson(int64_t{1} << 31), OrderedJson(int64_t{1} << 62),
          OrderedJson::array({64}), OrderedJson::object()}) {
      SCOPED_TRACE(value.dump());
      ExpectRefused(With(good, key, value), key);
    }
  }
  ExpectRefused(With(good, "num_experts_per_tok", 7), "num_experts_per_tok");  // of 6
  ExpectRefused(With(good, "num_experts_per_tok", 0), "num_experts_per_tok");
  ExpectRefused(With(good, "num_attention_heads", 0), "num_attention_heads");
  ExpectRefused(With(good, "num_attention_heads", 5), "num_");  // 64 is no multiple of it
  ExpectRefused(With(good, "num_key_value_heads", 3), "num_key_value_heads");
  ExpectRefused(With(good, "head_dim", 15), "head_dim");
  ExpectRefused(With(good, "hidden_act", "gelu"), "hidden_act");
  ExpectRefused(With(Golden("deepseek-bf16"), "scoring_func", "sigmoid"), "scoring_func");
  ExpectRefused(With(good, "tie_word_embeddings", 1), "tie_word_embeddings");
  ExpectRefused(With(good, "rms_norm_eps", "small"), "rms_norm_eps");
  ExpectRefused(With(good, "rms_norm_eps", -1e-5), "rms_norm_eps");
  ExpectRefused(With(good, "rms_norm_eps", 1e300), "rms_norm_eps");
  for (const double clip : {0.0, -8.0, 1e300}) {
    ExpectRefused(With(Golden("olmoe"), "clip_qkv", clip), "clip_qkv");
  }
  ExpectRefused(With(good, "quantization_config", {{"quant_method", "gptq"}}), "gptq");
  ExpectRefused(With(good, "model_type", "llama"), "llama");
  ExpectRefused(Without(good, "model_type"), "model_type");
  ExpectRefused(With(good, "model_type", 5), "model_type");
}

// Seen with hostile files: members of the wrong kind deep inside.
TEST(ModelConfig, RefusesWhatIsNoObject) {
  EXPECT_THROW(Parse(OrderedJson::array()), ModelError);
  EXPECT_THROW(Parse(OrderedJson()), ModelError);
  EXPECT_THROW(Parse(OrderedJson("mixtral")), ModelError);
  EXPECT_THROW(Parse(With(Golden("mixtral"), "quantization_config", 5)), ModelError);
  EXPECT_THROW(Parse(With(Golden("mixtral"), "quantization_config", {{"quant_method", 4}})),
               ModelError);
}

TEST(ConfigWithExperts, EditsEveryAliasAndKeepsTheOrder) {
  OrderedJson config = Golden("mixtral");
  config["num_experts"] = 6;
  config["n_routed_experts"] = nullptr;
  const Family& family = *Parse(config).family;
  const OrderedJson edited = ConfigWithExperts(config, family, 4);
  OrderedJson expected = config;
  expected["num_local_experts"] = 4;
  expected["num_experts"] = 4;
  EXPECT_EQ(edited.dump(), expected.dump());
  EXPECT_EQ(Parse(edited).UniformExperts(), 4);
  // A config that has no such key gets the family's.
  const OrderedJson bare = ConfigWithExperts({{"a", 1}}, family, 4);
  EXPECT_EQ(bare.dump(), R"({"a":1,"num_local_experts":4})");
}

TEST(Families, AreFoundByModelType) {
  EXPECT_EQ(AllFamilies().size(), 5u);
  for (const Family* family : AllFamilies()) {
    EXPECT_EQ(FindFamily(family->model_type), family);
  }
  EXPECT_EQ(FindFamily("Mixtral"), nullptr);
  EXPECT_EQ(FindFamily(""), nullptr);
}

}  // namespace
}  // namespace winnow
