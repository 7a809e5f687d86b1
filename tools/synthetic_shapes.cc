#include "synthetic_shapes.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"  // UsageError

namespace winnow::tools {
namespace {

bool IsMixtral(const Shape& shape) {
  return shape.family == "mixtral";
}

// Appends tensors of one layer or of the model's ends.
class TensorList {
 public:
  void Add(std::string name, std::vector<uint64_t> shape) {
    TensorInfo tensor;
    tensor.name = std::move(name);
    tensor.dtype = Dtype::kBF16;
    tensor.bytes = 2;
    for (const uint64_t extent : shape) tensor.bytes *= extent;
    tensor.shape = std::move(shape);
    tensors_.push_back(std::move(tensor));
  }
  void AddMatrix(std::string name, int64_t rows, int64_t cols) {
    Add(std::move(name), {static_cast<uint64_t>(rows), static_cast<uint64_t>(cols)});
  }
  void AddVector(std::string name, int64_t extent) {
    Add(std::move(name), {static_cast<uint64_t>(extent)});
  }
  // gate and up [width, hidden], down [hidden, width].
  void AddMlp(const std::string& prefix, int64_t width, int64_t hidden) {
    AddMatrix(prefix + ".down_proj.weight", hidden, width);
    AddMatrix(prefix + ".gate_proj.weight", width, hidden);
    AddMatrix(prefix + ".up_proj.weight", width, hidden);
  }
  std::vector<TensorInfo> Take() { return std::move(tensors_); }

 private:
  std::vector<TensorInfo> tensors_;
};

void AddAttention(const Shape& shape, const std::string& prefix, TensorList& list) {
  const int64_t query_width = shape.heads * shape.head_dim;
  const int64_t kv_width = shape.kv_heads * shape.head_dim;
  if (shape.family == "qwen2_moe") {
    list.AddVector(prefix + "k_proj.bias", kv_width);
    list.AddVector(prefix + "q_proj.bias", query_width);
    list.AddVector(prefix + "v_proj.bias", kv_width);
  }
  if (shape.family == "olmoe" || shape.family == "qwen3_moe") {
    const bool per_head = shape.family == "qwen3_moe";
    list.AddVector(prefix + "k_norm.weight", per_head ? shape.head_dim : kv_width);
    list.AddVector(prefix + "q_norm.weight", per_head ? shape.head_dim : query_width);
  }
  list.AddMatrix(prefix + "k_proj.weight", kv_width, shape.hidden);
  list.AddMatrix(prefix + "o_proj.weight", shape.hidden, query_width);
  list.AddMatrix(prefix + "q_proj.weight", query_width, shape.hidden);
  list.AddMatrix(prefix + "v_proj.weight", kv_width, shape.hidden);
}

void AddExperts(const Shape& shape, const std::string& layer, TensorList& list) {
  if (IsMixtral(shape)) {
    for (int64_t e = 0; e < shape.experts; ++e) {
      const std::string expert = fmt::format("{}block_sparse_moe.experts.{}.", layer, e);
      list.AddMatrix(expert + "w1.weight", shape.expert_width, shape.hidden);
      list.AddMatrix(expert + "w2.weight", shape.hidden, shape.expert_width);
      list.AddMatrix(expert + "w3.weight", shape.expert_width, shape.hidden);
    }
    list.AddMatrix(layer + "block_sparse_moe.gate.weight", shape.experts, shape.hidden);
    return;
  }
  for (int64_t e = 0; e < shape.experts; ++e) {
    list.AddMlp(fmt::format("{}mlp.experts.{}", layer, e), shape.expert_width, shape.hidden);
  }
  list.AddMatrix(layer + "mlp.gate.weight", shape.experts, shape.hidden);
  if (shape.family == "qwen2_moe") {
    list.AddMlp(layer + "mlp.shared_expert", shape.shared_width, shape.hidden);
    list.AddMatrix(layer + "mlp.shared_expert_gate.weight", 1, shape.hidden);
  } else if (shape.family == "deepseek") {
    list.AddMlp(layer + "mlp.shared_experts", shape.shared_width, shape.hidden);
  }
}

}  // namespace

Shape PublishedShape(const std::string& family) {
  // Mixtral-8x7B-v0.1, OLMoE-1B-7B-0924, Qwen1.5-MoE-A2.7B, Qwen3-30B-A3B, deepseek-moe-16b-base.
  static const Shape kShapes[] = {
      {.family = "mixtral",
       .hidden = 4096,
       .layers = 32,
       .heads = 32,
       .kv_heads = 8,
       .head_dim = 128,
       .vocab = 32000,
       .experts = 8,
       .experts_per_token = 2,
       .expert_width = 14336,
       .positions = 32768},
      {.family = "olmoe",
       .hidden = 2048,
       .layers = 16,
       .heads = 16,
       .kv_heads = 16,
       .head_dim = 128,
       .vocab = 50304,
       .experts = 64,
       .experts_per_token = 8,
       .expert_width = 1024,
       .positions = 4096},
      {.family = "qwen2_moe",
       .hidden = 2048,
       .layers = 24,
       .heads = 16,
       .kv_heads = 16,
       .head_dim = 128,
       .vocab = 151936,
       .experts = 60,
       .experts_per_token = 4,
       .expert_width = 1408,
       .shared_width = 5632,
       .dense_width = 5632,
       .positions = 8192},
      {.family = "qwen3_moe",
       .hidden = 2048,
       .layers = 48,
       .heads = 32,
       .kv_heads = 4,
       .head_dim = 128,
       .vocab = 151936,
       .experts = 128,
       .experts_per_token = 8,
       .expert_width = 768,
       .dense_width = 6144,
       .positions = 40960},
      {.family = "deepseek",
       .hidden = 2048,
       .layers = 28,
       .heads = 16,
       .kv_heads = 16,
       .head_dim = 128,
       .vocab = 102400,
       .experts = 64,
       .experts_per_token = 6,
       .expert_width = 1408,
       .shared_width = 2816,
       .dense_width = 10944,
       .dense_layers = 1,
       .positions = 4096},
  };
  for (const Shape& shape : kShapes) {
    if (shape.family == family) return shape;
  }
  throw UsageError(fmt::format("--family: no family \"{}\"", family),
                   "one of mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek");
}

void CheckShape(const Shape& shape) {
  for (const int64_t value :
       {shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab,
        shape.experts, shape.experts_per_token, shape.expert_width}) {
    if (value < 1 || value > (int64_t{1} << 24)) {
      throw UsageError(fmt::format("a size of {} is out of range", value));
    }
  }
  if (shape.heads % shape.kv_heads != 0) {
    throw UsageError(
        fmt::format("--kv-heads {} does not divide --heads {}", shape.kv_heads, shape.heads));
  }
  if (shape.experts_per_token > shape.experts) {
    throw UsageError(
        fmt::format("--top-k {} exceeds --experts {}", shape.experts_per_token, shape.experts));
  }
  const bool head_dim_free = IsMixtral(shape) || shape.family == "qwen3_moe";
  if (!head_dim_free && shape.heads * shape.head_dim != shape.hidden) {
    throw UsageError(
        fmt::format("{} has no head_dim of its own: --heads {} x --head-dim {} must be --hidden {}",
                    shape.family, shape.heads, shape.head_dim, shape.hidden));
  }
  if (shape.family == "deepseek" && shape.shared_width % shape.expert_width != 0) {
    throw UsageError("--shared-width must be a multiple of --expert-width (deepseek)");
  }
}

OrderedJson MakeConfig(const Shape& shape) {
  const bool deepseek = shape.family == "deepseek";
  OrderedJson config;
  const std::pair<const char*, const char*> architectures[] = {{"mixtral", "MixtralForCausalLM"},
                                                               {"olmoe", "OlmoeForCausalLM"},
                                                               {"qwen2_moe", "Qwen2MoeForCausalLM"},
                                                               {"qwen3_moe", "Qwen3MoeForCausalLM"},
                                                               {"deepseek", "DeepseekForCausalLM"}};
  for (const auto& [family, architecture] : architectures) {
    if (shape.family == family) config["architectures"] = OrderedJson::array({architecture});
  }
  config["attention_bias"] = false;
  config["attention_dropout"] = 0.0;
  if (shape.family == "olmoe") config["clip_qkv"] = nullptr;
  config["eos_token_id"] = shape.family == "olmoe" ? std::min<int64_t>(50279, shape.vocab - 1) : 2;
  if (deepseek) {
    config["first_k_dense_replace"] = shape.dense_layers;
    config["moe_layer_freq"] = 1;
    config["n_routed_experts"] = shape.experts;
    config["n_shared_experts"] = shape.shared_width / shape.expert_width;
    config["scoring_func"] = "softmax";
  } else {
    config[IsMixtral(shape) ? "num_local_experts" : "num_experts"] = shape.experts;
  }
  if (IsMixtral(shape) || shape.family == "qwen3_moe") config["head_dim"] = shape.head_dim;
  config["hidden_act"] = "silu";
  config["hidden_size"] = shape.hidden;
  config["initializer_range"] = 0.02;
  const bool own_expert_key = deepseek || shape.family.starts_with("qwen");
  config["intermediate_size"] = own_expert_key ? shape.dense_width : shape.expert_width;
  if (own_expert_key) config["moe_intermediate_size"] = shape.expert_width;
  if (shape.family == "qwen2_moe") config["shared_expert_intermediate_size"] = shape.shared_width;
  if (shape.family.starts_with("qwen")) {
    config["decoder_sparse_step"] = 1;
    config["mlp_only_layers"] = OrderedJson::array();
    config["use_sliding_window"] = false;
  }
  config["max_position_embeddings"] = shape.positions;
  config["model_type"] = shape.family;
  if (!IsMixtral(shape)) config["norm_topk_prob"] = shape.family == "qwen3_moe";
  config["num_attention_heads"] = shape.heads;
  config["num_experts_per_tok"] = shape.experts_per_token;
  config["num_hidden_layers"] = shape.layers;
  config["num_key_value_heads"] = shape.kv_heads;
  config["rms_norm_eps"] = IsMixtral(shape) || shape.family == "olmoe" ? 1e-5 : 1e-6;
  config["rope_scaling"] = nullptr;
  config["rope_theta"] = deepseek || shape.family == "olmoe" ? 1e4 : 1e6;
  config["sliding_window"] = nullptr;
  config["tie_word_embeddings"] = false;
  config["torch_dtype"] = "bfloat16";
  config["use_cache"] = true;
  config["vocab_size"] = shape.vocab;
  return config;
}

std::vector<TensorInfo> ListTensors(const Shape& shape) {
  TensorList list;
  list.AddMatrix("model.embed_tokens.weight", shape.vocab, shape.hidden);
  for (int64_t i = 0; i < shape.layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    list.AddVector(layer + "input_layernorm.weight", shape.hidden);
    if (i < shape.dense_layers) {
      list.AddMlp(layer + "mlp", shape.dense_width, shape.hidden);
    } else {
      AddExperts(shape, layer, list);
    }
    list.AddVector(layer + "post_attention_layernorm.weight", shape.hidden);
    AddAttention(shape, layer + "self_attn.", list);
  }
  list.AddVector("model.norm.weight", shape.hidden);
  list.AddMatrix("lm_head.weight", shape.vocab, shape.hidden);
  return list.Take();
}

}  // namespace winnow::tools
