#include "apply/condensed_layer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "weights/fused_feed_forward.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

// The stored format of the layer's experts.
Dtype SourceDtype(const Model& model, const LayerPlan& layer) {
  return model.layers()[static_cast<size_t>(layer.layer)].experts.front().gate.tensor->dtype;
}

TensorInfo Info(std::string name, Dtype dtype, int64_t rows, int64_t cols) {
  TensorInfo info;
  info.name = std::move(name);
  info.dtype = dtype;
  info.shape = {static_cast<uint64_t>(rows), static_cast<uint64_t>(cols)};
  info.bytes = static_cast<uint64_t>(rows) * static_cast<uint64_t>(cols) * (DtypeBits(dtype) / 8);
  return info;
}

int64_t Width(const Model& model, const LayerPlan& layer) {
  const LayerConfig& config = model.config().layers[static_cast<size_t>(layer.layer)];
  return FusedWidth(FusedParts(layer, model.config()), config.expert_width, config.shared_width);
}

// A stored matrix in another format.
std::vector<std::byte> Converted(const WeightMatrix& matrix, Dtype dtype) {
  std::vector<std::byte> bytes(static_cast<size_t>(matrix.rows * matrix.cols) *
                               (DtypeBits(dtype) / 8));
  for (size_t i = 0; i < static_cast<size_t>(matrix.rows * matrix.cols); ++i) {
    StoreFloat(dtype, LoadAsFloat(matrix.dtype, matrix.data, i), bytes.data(), i);
  }
  return bytes;
}

}  // namespace

int64_t StockWidth(const Model& model, const CompressionPlan& plan) {
  const ModelConfig& config = model.config();
  int64_t widest = 0;
  for (const LayerPlan& layer : plan.layers) {
    if (layer.condensed) widest = std::max(widest, Width(model, layer));
  }
  const bool shared =
      std::any_of(plan.layers.begin(), plan.layers.end(), [&](const LayerPlan& layer) {
        return layer.condensed && config.layers[static_cast<size_t>(layer.layer)].shared_width > 0;
      });
  if (shared && config.shared_expert_gated) {
    throw UsageError(
        "the shared expert has a gate that depends on the token: a condensed layer is no "
        "plain dense layer, so the family's own config has no words for it",
        "leave --stock out; --export-code brings code for transformers");
  }
  const int64_t width = StockDenseWidth(config, widest);
  if (widest > width) {
    throw UsageError(fmt::format("all dense layers have one width in config.json: {} now, and a "
                                 "condensed layer is {} wide",
                                 width, widest),
                     "keep fewer experts in condensed layers, or leave --stock out");
  }
  return width;
}

CondensedForm FormOf(const LayerPlan& layer, CondensedForm asked, bool refitted) {
  if (asked == CondensedForm::kStock) return asked;
  return refitted || !layer.condensed->neurons.empty() ? CondensedForm::kFused : asked;
}

std::vector<TensorInfo> CondensedTensors(const Model& model, const LayerPlan& layer,
                                         CondensedForm form, std::optional<Dtype> dtype,
                                         int64_t stock_width) {
  const FamilyTensorNames& names = model.config().family->names;
  const int64_t hidden = model.config().hidden_size;
  const Dtype stored = dtype.value_or(SourceDtype(model, layer));
  std::vector<TensorInfo> tensors;
  const auto add = [&](std::string_view gate, std::string_view up, std::string_view down,
                       int64_t expert, int64_t width) {
    tensors.push_back(Info(model.TensorName(layer.layer, gate, expert), stored, width, hidden));
    tensors.push_back(Info(model.TensorName(layer.layer, up, expert), stored, width, hidden));
    tensors.push_back(Info(model.TensorName(layer.layer, down, expert), stored, hidden, width));
  };
  if (form != CondensedForm::kParts) {
    const int64_t width = form == CondensedForm::kStock ? stock_width : Width(model, layer);
    if (width > 0) add(names.dense_gate, names.dense_up, names.dense_down, 0, width);
    return tensors;
  }
  const LayerConfig& config = model.config().layers[static_cast<size_t>(layer.layer)];
  for (int64_t i = 0; i < std::ssize(layer.condensed->experts); ++i) {
    add(names.expert_gate, names.expert_up, names.expert_down, i, config.expert_width);
  }
  return tensors;
}

std::vector<std::string> AbsorbedTensors(const Model& model, const LayerPlan& layer,
                                         CondensedForm form) {
  const FeedForwardSlices& shared = model.layers()[static_cast<size_t>(layer.layer)].shared;
  if (form == CondensedForm::kParts || !shared.gate.exists() ||
      model.config().shared_expert_gated) {
    return {};
  }
  return {shared.gate.tensor->name, shared.up.tensor->name, shared.down.tensor->name};
}

CondensedLayer CondensedConfig(const Model& model, const LayerPlan& layer, CondensedForm form) {
  CondensedLayer config{.layer = layer.layer};
  if (form == CondensedForm::kFused) config.dense_width = Width(model, layer);
  // A gated shared expert alone has nothing to fuse: no experts, their list empty.
  if (config.dense_width == 0) config.expert_alphas = AlphasOf(*layer.condensed);
  return config;
}

void BuildCondensedLayer(const Model& model, const LayerPlan& layer, CondensedForm form,
                         std::optional<Dtype> dtype, int64_t stock_width,
                         const SafetensorsFile* refitted_down, const fs::path& path) {
  // Experts in the order of the plan; read ascending, which is what the reader takes.
  LayerReaderOptions reading{.prefetch = false};
  reading.kept_experts.resize(static_cast<size_t>(model.config().num_layers()));
  const bool any = !layer.kept.empty();
  reading.kept_experts[static_cast<size_t>(layer.layer)] =
      any ? layer.kept : std::vector<int32_t>{0};
  LayerReader reader(model, reading);
  const LayerWeights& weights = reader.Get(layer.layer);
  const auto place = [&](int32_t expert) {
    return std::lower_bound(layer.kept.begin(), layer.kept.end(), expert) - layer.kept.begin();
  };
  const std::vector<TensorInfo> infos = CondensedTensors(model, layer, form, dtype, stock_width);
  std::vector<TensorData> tensors;
  std::vector<std::vector<std::byte>> storage;
  FusedFeedForward fused;
  std::vector<const WeightMatrix*> matrices;
  if (form != CondensedForm::kParts) {
    std::vector<FusedPart> parts = FusedParts(layer, model.config());
    for (FusedPart& part : parts) {
      if (part.expert != FusedPart::kShared) part.expert = static_cast<int32_t>(place(part.expert));
    }
    if (!parts.empty()) {
      fused = FuseParts(weights, parts, dtype.value_or(SourceDtype(model, layer)), stock_width);
      matrices = {&fused.weights.gate, &fused.weights.up, &fused.weights.down};
    }
  } else {
    for (const int32_t expert : layer.condensed->experts) {
      const FeedForwardWeights& from = weights.experts[static_cast<size_t>(place(expert))];
      for (const WeightMatrix* matrix : {&from.gate, &from.up, &from.down}) {
        matrices.push_back(matrix);
      }
    }
  }
  AlignedBuffer<std::byte> refitted;
  WeightMatrix down;
  if (refitted_down != nullptr && matrices.size() == 3) {
    const TensorInfo& tensor = refitted_down->Get(kRefittedDown);
    const auto width = static_cast<uint64_t>(Width(model, layer));
    if (tensor.shape != std::vector<uint64_t>{infos[2].shape[0], width} ||
        !IsComputeDtype(tensor.dtype)) {
      throw ModelError(fmt::format("{}: {} is {}, which is not of this model",
                                   refitted_down->path().string(), tensor.name, tensor.Describe()),
                       "start again with --force");
    }
    refitted = AlignedBuffer<std::byte>(static_cast<size_t>(tensor.bytes));
    refitted_down->Read(tensor, refitted.span());
    down = {refitted.data(), matrices[2]->rows, static_cast<int64_t>(width), tensor.dtype};
    if (width < infos[2].shape[1]) {  // filled up with zeros
      AlignedBuffer<std::byte> wide(static_cast<size_t>(tensor.bytes / width * infos[2].shape[1]));
      std::memset(wide.data(), 0, wide.size());
      const size_t row_bytes = static_cast<size_t>(tensor.bytes / infos[2].shape[0]);
      const size_t wide_bytes = wide.size() / static_cast<size_t>(infos[2].shape[0]);
      for (size_t r = 0; r < infos[2].shape[0]; ++r) {
        std::memcpy(wide.data() + r * wide_bytes, refitted.data() + r * row_bytes, row_bytes);
      }
      refitted = std::move(wide);
      down.data = refitted.data();
      down.cols = static_cast<int64_t>(infos[2].shape[1]);
    }
    matrices[2] = &down;
  }
  storage.resize(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    std::span<const std::byte> bytes(matrices[i]->data, static_cast<size_t>(matrices[i]->bytes()));
    if (matrices[i]->dtype != infos[i].dtype) {
      storage[i] = Converted(*matrices[i], infos[i].dtype);
      bytes = storage[i];
    }
    tensors.push_back({infos[i].name, infos[i].dtype, infos[i].shape, bytes});
  }
  WriteSafetensors(path, tensors);
}

fs::path CondensedLayerPath(const fs::path& folder, int32_t layer) {
  return folder / fmt::format("condensed-{:04d}.building", layer);
}

}  // namespace winnow
