// For tests of train/: condensed checkpoints made from golden ones, and batches of token ids.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/safetensors_writer.h"
#include "model/model.h"
#include "model/test_support.h"
#include "train/train_batch.h"
#include "train/train_run.h"

namespace winnow {

// A copy of golden checkpoint `source` whose layer `layer` is condensed: to its shared expert and
// experts 0 and 1 with constant weights, or (fused) to a dense SwiGLU that has expert 0's weights.
inline void WriteCondensed(const std::string& source, int layer, bool fused,
                           const fs::path& target) {
  CopyFolder(GoldenFolder(source), target);
  const Model model = Model::Open(target);
  const auto& slices = model.layers()[static_cast<size_t>(layer)];
  const auto stays_apart = [&](const TensorSlice& s) {
    return s.exists() && (!fused || slices.shared_router.exists());
  };
  struct Kept {
    std::string name;
    const TensorInfo* tensor;
    std::vector<std::byte> bytes = {};
  };
  std::vector<Kept> kept;
  const std::string prefix = "model.layers." + std::to_string(layer) + ".mlp.";
  for (const auto& shard : model.checkpoint().shards()) {
    for (const TensorInfo& tensor : shard.tensors()) {
      const TensorRole role = model.RoleOf(tensor.name);
      std::string name = tensor.name;
      if (role.layer == layer && role.kind == TensorKind::kExpertAxis0) continue;  // the router
      if (role.layer == layer && role.kind == TensorKind::kExpert) {
        if (role.expert >= (fused ? 1 : 2)) continue;
        if (fused) name = prefix + name.substr(name.find("experts.0.") + 10);
      } else if (fused && name.starts_with(prefix + "shared_expert") &&
                 !stays_apart(slices.shared.gate)) {
        continue;
      }
      kept.push_back({name, model.checkpoint().Find(tensor.name)});
    }
  }
  std::vector<TensorData> tensors;
  for (Kept& one : kept) {
    one.bytes.resize(static_cast<size_t>(one.tensor->bytes));
    model.checkpoint().ReadPart(*one.tensor, 0, one.bytes);
    tensors.push_back({one.name, one.tensor->dtype, one.tensor->shape, one.bytes});
  }
  WriteSafetensors(target / "model.safetensors", tensors);
  const int64_t width = model.config().layers[static_cast<size_t>(layer)].expert_width;
  EditConfig(target, [&](OrderedJson& config) {
    OrderedJson entry;
    if (fused) {
      entry["dense_width"] = width;
    } else {
      entry["expert_alphas"] = {0.4, 0.3};
    }
    config["condensed_layers"] = {{std::to_string(layer), entry}};
  });
}

// Rows of ids that a fixed rule picks below `vocabulary`.
inline TrainRows RandomRows(int64_t count, int64_t length, int64_t vocabulary) {
  TrainRows data;
  uint32_t state = 12345;
  for (int64_t r = 0; r < count; ++r) {
    TrainRow row;
    for (int64_t t = 0; t < length + r % 3; ++t) {
      state = state * 1664525u + 1013904223u;
      row.ids.push_back(static_cast<int32_t>((state >> 8) % static_cast<uint32_t>(vocabulary)));
    }
    data.rows.push_back(std::move(row));
  }
  return data;
}

}  // namespace winnow
