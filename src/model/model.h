// A checkpoint with meaning: its config and, for every layer, where each weight lies on disk. Holds
// no weight bytes. Opening checks every name and shape against the config, so that nothing after it
// can meet a missing or misshapen tensor. ModelError names the tensor, what was expected and what
// was found.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/packed_format.h"     // PackedFormat
#include "checkpoint/checkpoint.h"  // Checkpoint, TensorInfo
#include "model/model_config.h"     // ModelConfig, LayerConfig

namespace winnow {

// A matrix (or vector: rows = 1) inside a stored tensor; experts of a fused tensor are slices of
// it.
struct TensorSlice {
  const TensorInfo* tensor = nullptr;
  uint64_t offset_bytes = 0;  // inside the tensor
  int64_t rows = 0;
  int64_t cols = 0;
  PackedFormat packed = {};  // not empty: in few bits, a range of an U8 tensor

  bool exists() const { return tensor != nullptr; }
  uint64_t bytes() const {
    if (!exists()) return 0;
    if (!packed.empty()) return PackedBytes(packed, rows, cols);
    return static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols) *
           (DtypeBits(tensor->dtype) / 8);
  }
};

// gate, up [width, hidden]; down [hidden, width].
struct FeedForwardSlices {
  TensorSlice gate, up, down;
};

struct LayerSlices {
  TensorSlice input_norm, post_attention_norm;  // [hidden]
  TensorSlice q, k, v, o;                       // [heads * head_dim, hidden], ..., [hidden, ...]
  TensorSlice q_bias, k_bias, v_bias, o_bias;   // optional
  TensorSlice q_norm, k_norm;                   // optional
  TensorSlice router;                           // [E, hidden], MoE layers
  std::vector<FeedForwardSlices> experts;       // [E], MoE and condensed layers
  FeedForwardSlices shared;                     // MoE and condensed layers with a shared expert
  TensorSlice shared_router;                    // [1, hidden], sigmoid gate of the shared expert
  FeedForwardSlices dense;                      // layers without experts, fused condensed layers

  // Bytes of everything but routed experts, and of all routed experts.
  uint64_t CommonBytes() const;
  uint64_t ExpertBytes() const;
};

// What a stored tensor is to someone who removes experts.
enum class TensorKind : uint8_t {
  kOther,        // carried through unchanged
  kExpert,       // one matrix of one expert, or all it has packed: dropped or renamed
  kExpertAxis0,  // first axis counts experts (router rows, fused experts): rows gathered
};

struct TensorRole {
  TensorKind kind = TensorKind::kOther;
  int32_t layer = -1;
  int32_t expert = -1;  // kExpert only
};

// "model.layers.0.self_attn.q_proj.weight" -> "model.layers.0.self_attn.q_proj.packed".
std::string PackedTensorName(std::string_view weight_name);

class Model {
 public:
  static Model Open(const fs::path& folder);
  static Model FromCheckpoint(Checkpoint checkpoint);

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const ModelConfig& config() const { return config_; }
  const std::vector<LayerSlices>& layers() const { return layers_; }
  const TensorSlice& embedding() const { return embedding_; }    // [V, hidden]
  const TensorSlice& final_norm() const { return final_norm_; }  // [hidden]
  const TensorSlice& lm_head() const { return lm_head_; }        // the embedding if tied
  // Checkpoint findings plus tensors that are no part of the family (carried through unread).
  const std::vector<std::string>& findings() const { return findings_; }
  TensorRole RoleOf(const std::string& tensor_name) const;
  // The name of expert `to` of a layer in place of expert `from`.
  std::string RenameExpert(const std::string& tensor_name, int32_t from, int32_t to) const;
  // The tensor that holds an expert's three matrices packed.
  std::string PackedExpertName(int64_t layer, int64_t expert) const;
  // The full name of a tensor of a layer by its pattern in FamilyTensorNames.
  std::string TensorName(int64_t layer, std::string_view pattern, int64_t expert = 0) const;
  uint64_t parameter_count() const { return parameter_count_; }
  // Parameters one token uses: everything but unselected experts; the embedding counts one row.
  uint64_t active_parameter_count() const;

 private:
  Model() = default;
  std::unique_ptr<Checkpoint> checkpoint_;  // slices point into it
  ModelConfig config_;
  std::vector<LayerSlices> layers_;
  TensorSlice embedding_, final_norm_, lm_head_;
  std::unordered_map<std::string, TensorRole> roles_;
  std::vector<std::string> findings_;
  uint64_t parameter_count_ = 0;
  friend class ModelResolver;
};

}  // namespace winnow
