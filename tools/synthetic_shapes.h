// What a synthetic checkpoint of a family looks like: its config.json and its tensors in the order
// they are written. Used by make_synthetic_checkpoint. The shapes a family starts from are those of
// its best-known published model.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"               // OrderedJson
#include "checkpoint/tensor_info.h"  // TensorInfo

namespace winnow::tools {

struct Shape {
  std::string family;
  int64_t hidden = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab = 0;
  int64_t experts = 0;
  int64_t experts_per_token = 0;
  int64_t expert_width = 0;
  int64_t shared_width = 0;  // of the shared expert as one MLP; 0: none
  int64_t dense_width = 0;   // of layers without experts
  int64_t dense_layers = 0;  // that many first layers have no experts (deepseek)
  int64_t positions = 0;
};

// "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek"; UsageError names these otherwise.
Shape PublishedShape(const std::string& family);
// UsageError if the numbers contradict each other.
void CheckShape(const Shape& shape);
OrderedJson MakeConfig(const Shape& shape);
// All BF16, in layer order, names as the published checkpoints have them.
std::vector<TensorInfo> ListTensors(const Shape& shape);

}  // namespace winnow::tools
