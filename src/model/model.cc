#include "model/model.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>
#include <memory>
#include <unordered_set>

#include "base/checked_math.h"
#include "base/error.h"

namespace winnow {

uint64_t LayerSlices::CommonBytes() const {
  uint64_t total = 0;
  for (const TensorSlice* slice : {&input_norm,
                                   &post_attention_norm,
                                   &q,
                                   &k,
                                   &v,
                                   &o,
                                   &q_bias,
                                   &k_bias,
                                   &v_bias,
                                   &o_bias,
                                   &q_norm,
                                   &k_norm,
                                   &router,
                                   &shared.gate,
                                   &shared.up,
                                   &shared.down,
                                   &shared_router,
                                   &dense.gate,
                                   &dense.up,
                                   &dense.down}) {
    total += slice->bytes();
  }
  return total;
}

uint64_t LayerSlices::ExpertBytes() const {
  uint64_t total = 0;
  for (const FeedForwardSlices& expert : experts) {
    total += expert.gate.bytes() + expert.up.bytes() + expert.down.bytes();
  }
  return total;
}

// Finds and checks every tensor of a model; see Model::FromCheckpoint.
class ModelResolver {
 public:
  explicit ModelResolver(Model& model)
      : model_(model), checkpoint_(*model.checkpoint_), config_(model.config_) {}

  void Resolve() {
    model_.embedding_ =
        Require("model.embed_tokens.weight", config_.vocab_size, config_.hidden_size);
    model_.final_norm_ = Vector("model.norm.weight", config_.hidden_size);
    ResolveLmHead();
    const auto num_layers = config_.num_layers();
    model_.layers_.reserve(static_cast<size_t>(num_layers));
    for (int64_t i = 0; i < num_layers; ++i) ResolveLayer(i);
    ListUnknownTensors();
  }

  // "mlp.experts.{e}.gate_proj.weight" -> "mlp.experts.{e}.packed", for any of its matrices.
  static std::string PackedExpertPattern(const FamilyTensorNames& names) {
    const std::string_view pattern = names.expert_gate;
    return std::string(pattern.substr(0, pattern.find("{e}"))) + "{e}.packed";
  }

  static std::string ExpertName(std::string_view pattern, int64_t expert) {
    std::string name(pattern);
    if (const size_t at = name.find("{e}"); at != std::string::npos) {
      name.replace(at, 3, std::to_string(expert));
    }
    return name;
  }

 private:
  TensorSlice Require(const std::string& name, int64_t rows, int64_t cols) {
    const TensorInfo* tensor = checkpoint_.Find(name);
    if (tensor == nullptr) {
      throw ModelError(fmt::format("{}: tensor {} is missing, expected shape [{}, {}]",
                                   checkpoint_.folder().string(), name, rows, cols),
                       "the checkpoint is incomplete or its config.json is of another model");
    }
    return Check(*tensor, rows, cols, {static_cast<uint64_t>(rows), static_cast<uint64_t>(cols)});
  }
  // A matrix that `format` says is packed, or as it is.
  TensorSlice Matrix(const std::string& name, int64_t rows, int64_t cols,
                     const PackedFormat& format) {
    const std::string packed_name = PackedTensorName(name);
    RefuseBeside(format.empty() ? packed_name : name, format.empty());
    if (format.empty()) return Require(name, rows, cols);
    const uint64_t bytes = PackedBytes(format, rows, cols);
    const TensorInfo& tensor = Packed(packed_name, bytes, bytes, PackedFormatName(format));
    packed_weights_[&tensor] = Elements(rows, cols);
    return {&tensor, 0, rows, cols, format};
  }

  FeedForwardSlices PackedExpert(const std::string& name, int64_t width,
                                 const PackedFormat& format) {
    const int64_t hidden = config_.hidden_size;
    const uint64_t inner = PackedBytes(format, width, hidden);
    const uint64_t bytes =
        CheckedAdd(CheckedMul(2, inner, name), PackedBytes(format, hidden, width), name);
    const auto padded = [&](uint64_t alignment) {
      return CheckedAdd(bytes, alignment - 1, name) / alignment * alignment;
    };
    const TensorInfo& tensor =
        Packed(name, padded(kPackedAlignment), padded(kExtentAlignment), PackedFormatName(format));
    packed_weights_[&tensor] = 3 * Elements(width, hidden);
    return {.gate = {&tensor, 0, width, hidden, format},
            .up = {&tensor, inner, width, hidden, format},
            .down = {&tensor, 2 * inner, hidden, width, format}};
  }

  static uint64_t Elements(int64_t rows, int64_t cols) {
    return static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols);
  }

  const TensorInfo& Packed(const std::string& name, uint64_t bytes, uint64_t or_bytes,
                           const std::string& format) {
    const std::string expected = bytes == or_bytes
                                     ? fmt::format("U8 [{}]", bytes)
                                     : fmt::format("U8 [{}] (or [{}])", bytes, or_bytes);
    const TensorInfo* tensor = checkpoint_.Find(name);
    if (tensor == nullptr) {
      throw ModelError(fmt::format("{}: tensor {} is missing, expected {} ({})",
                                   checkpoint_.folder().string(), name, expected, format),
                       "the checkpoint is incomplete or its config.json is of another model");
    }
    if (tensor->dtype != Dtype::kU8 || tensor->shape.size() != 1 ||
        (tensor->bytes != bytes && tensor->bytes != or_bytes)) {
      throw ModelError(
          fmt::format("{}: tensor {}: expected {} ({}), got {}", checkpoint_.folder().string(),
                      name, expected, format, tensor->Describe()),
          "the tensor does not fit config.json; quantise the original model again");
    }
    known_.insert(tensor);
    return *tensor;
  }

  // What is stored both packed and not has no meaning that is certain.
  void RefuseBeside(const std::string& name, bool is_packed) {
    if (checkpoint_.Find(name) == nullptr) return;
    throw ModelError(
        fmt::format("{}: tensor {} exists, but by config.json the matrix is {}",
                    checkpoint_.folder().string(), name, is_packed ? "not packed" : "packed"),
        "config.json and the weights are of different models");
  }

  TensorSlice Vector(const std::string& name, int64_t size) {
    const TensorInfo* tensor = checkpoint_.Find(name);
    if (tensor == nullptr) {
      throw ModelError(fmt::format("{}: tensor {} is missing, expected shape [{}]",
                                   checkpoint_.folder().string(), name, size),
                       "the checkpoint is incomplete or its config.json is of another model");
    }
    return Check(*tensor, 1, size, {static_cast<uint64_t>(size)});
  }
  TensorSlice Check(const TensorInfo& tensor, int64_t rows, int64_t cols,
                    const std::vector<uint64_t>& shape) {
    if (tensor.shape != shape) {
      throw ModelError(
          fmt::format("{}: tensor {}: expected shape [{}], got {}", checkpoint_.folder().string(),
                      tensor.name, fmt::join(shape, ", "), tensor.Describe()),
          "the tensor does not fit config.json; fetch both from the same revision");
    }
    if (!IsComputeDtype(tensor.dtype)) {
      throw ModelError(fmt::format("{}: tensor {}: expected F32, F16 or BF16, got {}",
                                   checkpoint_.folder().string(), tensor.name, tensor.Describe()),
                       "convert the checkpoint to bfloat16 first");
    }
    known_.insert(&tensor);
    return {&tensor, 0, rows, cols};
  }

  void ResolveLmHead() {
    const TensorInfo* head = checkpoint_.Find("lm_head.weight");
    if (head == nullptr && config_.tie_word_embeddings) {
      model_.lm_head_ = model_.embedding_;
      return;
    }
    model_.lm_head_ =
        Matrix("lm_head.weight", config_.vocab_size, config_.hidden_size, config_.lm_head_format);
    if (config_.tie_word_embeddings) model_.lm_head_ = model_.embedding_;  // stored copy is ignored
  }

  void ResolveLayer(int64_t index) {
    const std::string prefix = fmt::format("model.layers.{}.", index);
    const LayerConfig& layer = config_.layers[static_cast<size_t>(index)];
    const int64_t hidden = config_.hidden_size;
    LayerSlices slices;
    slices.input_norm = Vector(prefix + "input_layernorm.weight", hidden);
    slices.post_attention_norm = Vector(prefix + "post_attention_layernorm.weight", hidden);
    const std::string attention = prefix + "self_attn.";
    const PackedFormat& packed = layer.formats.attention;
    slices.q = Matrix(attention + "q_proj.weight", config_.query_width(), hidden, packed);
    slices.k = Matrix(attention + "k_proj.weight", config_.kv_width(), hidden, packed);
    slices.v = Matrix(attention + "v_proj.weight", config_.kv_width(), hidden, packed);
    slices.o = Matrix(attention + "o_proj.weight", hidden, config_.query_width(), packed);
    if (config_.qkv_bias) {
      slices.q_bias = Vector(attention + "q_proj.bias", config_.query_width());
      slices.k_bias = Vector(attention + "k_proj.bias", config_.kv_width());
      slices.v_bias = Vector(attention + "v_proj.bias", config_.kv_width());
    }
    if (config_.output_bias) slices.o_bias = Vector(attention + "o_proj.bias", hidden);
    if (config_.qk_norm != QkNorm::kNone) {
      const bool per_head = config_.qk_norm == QkNorm::kPerHead;
      slices.q_norm =
          Vector(attention + "q_norm.weight", per_head ? config_.head_dim : config_.query_width());
      slices.k_norm =
          Vector(attention + "k_norm.weight", per_head ? config_.head_dim : config_.kv_width());
    }
    const FamilyTensorNames& names = config_.family->names;
    if (layer.is_moe) {
      ResolveExperts(index, prefix, layer, slices);
    } else if (layer.dense_width > 0) {
      slices.dense = FeedForward(prefix, names.dense_gate, names.dense_up, names.dense_down,
                                 layer.dense_width, layer.formats.dense);
    } else {  // condensed, parts apart; they are no experts to whoever prunes
      for (int64_t e = 0; e < layer.num_experts; ++e) {
        slices.experts.push_back(Expert(prefix, layer, e));
      }
    }
    if ((layer.is_moe || layer.is_condensed) && layer.shared_width > 0) {
      slices.shared = FeedForward(prefix, names.shared_gate, names.shared_up, names.shared_down,
                                  layer.shared_width, layer.formats.shared);
      if (config_.shared_expert_gated) {
        slices.shared_router = Require(prefix + std::string(names.shared_router), 1, hidden);
      }
    }
    model_.layers_.push_back(std::move(slices));
  }

  FeedForwardSlices FeedForward(const std::string& prefix, std::string_view gate,
                                std::string_view up, std::string_view down, int64_t width,
                                const PackedFormat& format) {
    FeedForwardSlices slices;
    slices.gate = Matrix(prefix + std::string(gate), width, config_.hidden_size, format);
    slices.up = Matrix(prefix + std::string(up), width, config_.hidden_size, format);
    slices.down = Matrix(prefix + std::string(down), config_.hidden_size, width, format);
    return slices;
  }

  FeedForwardSlices Expert(const std::string& prefix, const LayerConfig& layer, int64_t e) {
    const FamilyTensorNames& names = config_.family->names;
    const std::string gate = ExpertName(names.expert_gate, e);
    const std::string packed_name = prefix + ExpertName(PackedExpertPattern(names), e);
    const PackedFormat format = layer.formats.Expert(static_cast<size_t>(e));
    RefuseBeside(format.empty() ? packed_name : prefix + gate, format.empty());
    if (!format.empty()) return PackedExpert(packed_name, layer.expert_width, format);
    return FeedForward(prefix, gate, ExpertName(names.expert_up, e),
                       ExpertName(names.expert_down, e), layer.expert_width, {});
  }

  void ResolveExperts(int64_t index, const std::string& prefix, const LayerConfig& layer,
                      LayerSlices& slices) {
    const FamilyTensorNames& names = config_.family->names;
    const auto layer_id = static_cast<int32_t>(index);
    const std::string fused_name = prefix + std::string(names.fused_gate_up);
    const bool fused = checkpoint_.Find(fused_name) != nullptr;
    const bool per_expert = !layer.formats.experts.empty() ||
                            checkpoint_.Find(prefix + ExpertName(names.expert_gate, 0)) != nullptr;
    if (fused && per_expert) {
      throw ModelError(fmt::format("{}: layer {} has both fused and per-expert tensors",
                                   checkpoint_.folder().string(), index),
                       "remove one of the two layouts");
    }
    // A quantised model that had them fused keeps its router's name.
    const bool router_of_fused =
        fused || checkpoint_.Find(prefix + std::string(names.router)) == nullptr;
    ResolveRouter(layer_id, prefix, router_of_fused, layer, slices);
    if (fused) {
      ResolveFused(layer_id, prefix, layer, slices);
      return;
    }
    for (int64_t e = 0; e < layer.num_experts; ++e) {
      slices.experts.push_back(Expert(prefix, layer, e));
      for (const TensorSlice* slice :
           {&slices.experts.back().gate, &slices.experts.back().up, &slices.experts.back().down}) {
        model_.roles_[slice->tensor->name] = {TensorKind::kExpert, layer_id,
                                              static_cast<int32_t>(e)};
      }
    }
    for (const std::string& pattern :
         {std::string(names.expert_gate), PackedExpertPattern(names)}) {
      const std::string beyond = prefix + ExpertName(pattern, layer.num_experts);
      if (checkpoint_.Find(beyond) == nullptr) continue;
      throw ModelError(fmt::format("{}: tensor {} exists, but config.json says {} experts",
                                   checkpoint_.folder().string(), beyond, layer.num_experts),
                       "config.json and the weights are of different models");
    }
  }

  void ResolveRouter(int32_t layer_id, const std::string& prefix, bool fused,
                     const LayerConfig& layer, LayerSlices& slices) {
    const FamilyTensorNames& names = config_.family->names;
    std::string name = prefix + std::string(fused ? names.fused_router : names.router);
    if (fused && checkpoint_.Find(name) == nullptr) name = prefix + std::string(names.router);
    slices.router = Require(name, layer.num_experts, config_.hidden_size);
    model_.roles_[name] = {TensorKind::kExpertAxis0, layer_id, -1};
  }

  void ResolveFused(int32_t layer_id, const std::string& prefix, const LayerConfig& layer,
                    LayerSlices& slices) {
    const FamilyTensorNames& names = config_.family->names;
    const int64_t hidden = config_.hidden_size, width = layer.expert_width;
    const TensorInfo* both = checkpoint_.Find(prefix + std::string(names.fused_gate_up));
    const TensorInfo* down = checkpoint_.Find(prefix + std::string(names.fused_down));
    const auto experts = static_cast<uint64_t>(layer.num_experts);
    const auto h = static_cast<uint64_t>(hidden), i = static_cast<uint64_t>(width);
    if (down == nullptr) {
      throw ModelError(fmt::format("{}: tensor {}{} is missing", checkpoint_.folder().string(),
                                   prefix, names.fused_down));
    }
    // [E, hidden, 2I] is the transposed orientation some trainers write.
    if (both->shape == std::vector<uint64_t>{experts, h, 2 * i} && h != 2 * i) {
      throw ModelError(fmt::format("{}: tensor {} is stored transposed ({}), expected [{}, {}, {}]",
                                   checkpoint_.folder().string(), both->name, both->Describe(),
                                   experts, 2 * i, h),
                       "save the checkpoint in its original per-expert format");
    }
    Check(*both, 0, 0, {experts, 2 * i, h});
    Check(*down, 0, 0, {experts, h, i});
    const uint64_t matrix = h * i * (DtypeBits(both->dtype) / 8);
    const uint64_t down_matrix = h * i * (DtypeBits(down->dtype) / 8);
    for (uint64_t e = 0; e < experts; ++e) {
      FeedForwardSlices expert;
      expert.gate = {both, 2 * e * matrix, width, hidden};
      expert.up = {both, (2 * e + 1) * matrix, width, hidden};
      expert.down = {down, e * down_matrix, hidden, width};
      slices.experts.push_back(expert);
    }
    for (const TensorInfo* tensor : {both, down}) {
      model_.roles_[tensor->name] = {TensorKind::kExpertAxis0, layer_id, -1};
    }
  }

  void ListUnknownTensors() {
    std::vector<std::string> unknown;
    for (const TensorInfo& tensor : checkpoint_.tensors()) {
      uint64_t count = 1;
      for (const uint64_t dim : tensor.shape) count *= dim;  // checked when the header was read
      const TensorInfo* own = checkpoint_.Find(tensor.name);
      const auto packed = packed_weights_.find(own);
      model_.parameter_count_ += packed == packed_weights_.end() ? count : packed->second;
      if (known_.contains(own)) continue;
      // Old exports carry the frequencies; they follow from the config.
      if (tensor.name.ends_with(".rotary_emb.inv_freq")) continue;
      unknown.push_back(tensor.name);
    }
    model_.findings_ = checkpoint_.findings();
    if (!unknown.empty()) {
      const size_t shown = std::min<size_t>(unknown.size(), 4);
      model_.findings_.push_back(fmt::format(
          "{} tensors are no part of a {} model and are carried through unread: {}{}",
          unknown.size(), config_.family->model_type,
          fmt::join(unknown.begin(), unknown.begin() + static_cast<std::ptrdiff_t>(shown), ", "),
          unknown.size() > shown ? ", ..." : ""));
    }
  }

  Model& model_;
  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  std::unordered_set<const TensorInfo*> known_;
  std::unordered_map<const TensorInfo*, uint64_t> packed_weights_;  // weights in a packed tensor
};

Model Model::Open(const fs::path& folder) {
  return FromCheckpoint(Checkpoint::Open(folder));
}

Model Model::FromCheckpoint(Checkpoint checkpoint) {
  Model model;
  model.checkpoint_ = std::make_unique<Checkpoint>(std::move(checkpoint));
  model.config_ = ParseModelConfig(model.checkpoint_->config(),
                                   (model.checkpoint_->folder() / "config.json").string());
  ModelResolver(model).Resolve();
  return model;
}

TensorRole Model::RoleOf(const std::string& tensor_name) const {
  const auto it = roles_.find(tensor_name);
  return it == roles_.end() ? TensorRole{} : it->second;
}

std::string Model::TensorName(int64_t layer, std::string_view pattern, int64_t expert) const {
  return fmt::format("model.layers.{}.{}", layer, ModelResolver::ExpertName(pattern, expert));
}

std::string Model::PackedExpertName(int64_t layer, int64_t expert) const {
  return TensorName(layer, ModelResolver::PackedExpertPattern(config_.family->names), expert);
}

std::string PackedTensorName(std::string_view weight_name) {
  if (weight_name.ends_with(".weight")) weight_name.remove_suffix(std::strlen(".weight"));
  return std::string(weight_name) + ".packed";
}

std::string Model::RenameExpert(const std::string& tensor_name, int32_t from, int32_t to) const {
  const std::string before = fmt::format("experts.{}.", from);
  std::string name = tensor_name;
  if (const size_t at = name.find(before); at != std::string::npos) {
    name.replace(at, before.size(), fmt::format("experts.{}.", to));
  }
  return name;
}

uint64_t Model::active_parameter_count() const {
  uint64_t count = parameter_count_;
  const auto h = static_cast<uint64_t>(config_.hidden_size);
  for (const LayerConfig& layer : config_.layers) {
    if (!layer.is_moe) continue;
    const auto idle = static_cast<uint64_t>(layer.num_experts - config_.num_experts_per_tok);
    count -= idle * 3 * h * static_cast<uint64_t>(layer.expert_width);
  }
  if (lm_head_.tensor != embedding_.tensor) {
    count -= (static_cast<uint64_t>(config_.vocab_size) - 1) * h;
  }
  return count;
}

}  // namespace winnow
