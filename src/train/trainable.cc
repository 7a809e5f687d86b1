#include "train/trainable.h"

#include <fmt/format.h>

#include <functional>

#include "base/error.h"

namespace winnow {
namespace {

using Visit = std::function<void(const TensorSlice&, WeightPlace, int32_t owner)>;

void ForEachSlice(const LayerSlices& layer, const Visit& visit) {
  visit(layer.input_norm, WeightPlace::kInputNorm, 0);
  visit(layer.q, WeightPlace::kQ, 0);
  visit(layer.k, WeightPlace::kK, 0);
  visit(layer.v, WeightPlace::kV, 0);
  visit(layer.o, WeightPlace::kO, 0);
  visit(layer.q_bias, WeightPlace::kQBias, 0);
  visit(layer.k_bias, WeightPlace::kKBias, 0);
  visit(layer.v_bias, WeightPlace::kVBias, 0);
  visit(layer.o_bias, WeightPlace::kOBias, 0);
  visit(layer.q_norm, WeightPlace::kQNorm, 0);
  visit(layer.k_norm, WeightPlace::kKNorm, 0);
  visit(layer.post_attention_norm, WeightPlace::kPostAttentionNorm, 0);
  visit(layer.router, WeightPlace::kRouter, 0);
  visit(layer.shared_router, WeightPlace::kSharedRouter, 0);
  const auto mlp = [&](const FeedForwardSlices& part, int32_t owner) {
    visit(part.gate, WeightPlace::kGate, owner);
    visit(part.up, WeightPlace::kUp, owner);
    visit(part.down, WeightPlace::kDown, owner);
  };
  mlp(layer.dense, kDenseOwner);
  mlp(layer.shared, kSharedOwner);
  for (size_t e = 0; e < layer.experts.size(); ++e) {
    mlp(layer.experts[e], static_cast<int32_t>(e));
  }
}

bool IsMlp(WeightPlace place) {
  return place == WeightPlace::kGate || place == WeightPlace::kUp || place == WeightPlace::kDown;
}

bool IsNorm(WeightPlace place) {
  return place == WeightPlace::kInputNorm || place == WeightPlace::kPostAttentionNorm ||
         place == WeightPlace::kQNorm || place == WeightPlace::kKNorm ||
         place == WeightPlace::kFinalNorm;
}

bool Chosen(const std::string& what, const LayerConfig* layer, const TensorSlice& slice,
            WeightPlace place, int32_t owner) {
  if (what == "condensed-experts") return layer != nullptr && layer->is_condensed && IsMlp(place);
  if (what == "experts") {
    return layer != nullptr && IsMlp(place) && (owner != kDenseOwner || layer->is_condensed);
  }
  if (what == "router") {
    return place == WeightPlace::kRouter || place == WeightPlace::kSharedRouter;
  }
  if (what == "norms") return IsNorm(place);
  return MatchesPattern(slice.tensor->name, what);
}

std::vector<std::string> SplitList(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

[[noreturn]] void RefuseUnmatched(const Model& model, const std::string& what) {
  if (what == "condensed-experts") {
    throw UsageError("the model has no condensed layers",
                     "condense layers first (--method cd-moe), or say what to train with --train: "
                     "experts, router, norms or a pattern of tensor names");
  }
  for (const TensorSlice* slice : {&model.embedding(), &model.lm_head()}) {
    if (slice->exists() && MatchesPattern(slice->tensor->name, what)) {
      throw UsageError(fmt::format("--train {}: {} is never trained", what, slice->tensor->name),
                       "embedding and lm_head stay as they are; train layers or norms");
    }
  }
  throw UsageError(fmt::format("--train {} fits no tensor of the model", what),
                   "one of condensed-experts, experts, router, norms, or a pattern such as "
                   "'model.layers.3.*down_proj*'");
}

}  // namespace

std::string Parameter::Name() const {
  const bool whole = slice.bytes() == slice.tensor->bytes;
  return whole ? slice.tensor->name : fmt::format("{}@{}", slice.tensor->name, slice.offset_bytes);
}

bool MatchesPattern(const std::string& name, const std::string& pattern) {
  size_t n = 0, p = 0, star = std::string::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n]) && pattern[p] != '*') {
      ++n;
      ++p;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (star != std::string::npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

std::vector<Parameter> ChooseParameters(const Model& model, const std::string& what) {
  const std::vector<std::string> wanted = SplitList(what);
  std::vector<uint8_t> used(wanted.size());
  std::vector<Parameter> parameters;
  uint64_t offset = 0;
  const auto consider = [&](const LayerConfig* config, int32_t layer, const TensorSlice& slice,
                            WeightPlace place, int32_t owner) {
    if (!slice.exists()) return;
    bool chosen = false;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (!Chosen(wanted[i], config, slice, place, owner)) continue;
      used[i] = 1;
      chosen = true;
    }
    if (!chosen) return;
    if (!slice.packed.empty()) {
      throw UsageError(fmt::format("--train {}: {} is packed, as {}, and cannot be trained", what,
                                   slice.tensor->name, PackedFormatName(slice.packed)),
                       "train the original model and quantise last, or train what is not packed: "
                       "router, norms");
    }
    const auto count = static_cast<uint64_t>(slice.rows) * static_cast<uint64_t>(slice.cols);
    parameters.push_back({slice, layer, place, owner, offset, count});
    offset += count;
  };
  for (size_t l = 0; l < model.layers().size(); ++l) {
    ForEachSlice(
        model.layers()[l], [&](const TensorSlice& slice, WeightPlace place, int32_t owner) {
          consider(&model.config().layers[l], static_cast<int32_t>(l), slice, place, owner);
        });
  }
  consider(nullptr, -1, model.final_norm(), WeightPlace::kFinalNorm, 0);
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (used[i] == 0) RefuseUnmatched(model, wanted[i]);
  }
  return parameters;
}

namespace {

FeedForwardWeights& MlpOf(LayerWeights& weights, int32_t owner) {
  if (owner == kDenseOwner) return weights.dense;
  if (owner == kSharedOwner) return weights.shared;
  return weights.experts[static_cast<size_t>(owner)];
}

}  // namespace

WeightMatrix* MatrixOf(LayerWeights& weights, const Parameter& parameter) {
  switch (parameter.place) {
    case WeightPlace::kQ:
      return &weights.q;
    case WeightPlace::kK:
      return &weights.k;
    case WeightPlace::kV:
      return &weights.v;
    case WeightPlace::kO:
      return &weights.o;
    case WeightPlace::kRouter:
      return &weights.router;
    case WeightPlace::kSharedRouter:
      return &weights.shared_router;
    case WeightPlace::kGate:
      return &MlpOf(weights, parameter.owner).gate;
    case WeightPlace::kUp:
      return &MlpOf(weights, parameter.owner).up;
    case WeightPlace::kDown:
      return &MlpOf(weights, parameter.owner).down;
    default:
      return nullptr;
  }
}

std::vector<float>* VectorOf(LayerWeights& weights, const Parameter& parameter) {
  switch (parameter.place) {
    case WeightPlace::kInputNorm:
      return &weights.input_norm;
    case WeightPlace::kPostAttentionNorm:
      return &weights.post_attention_norm;
    case WeightPlace::kQBias:
      return &weights.q_bias;
    case WeightPlace::kKBias:
      return &weights.k_bias;
    case WeightPlace::kVBias:
      return &weights.v_bias;
    case WeightPlace::kOBias:
      return &weights.o_bias;
    case WeightPlace::kQNorm:
      return &weights.q_norm;
    case WeightPlace::kKNorm:
      return &weights.k_norm;
    default:
      return nullptr;
  }
}

float*& SlotOf(GradientSlots& slots, const Parameter& parameter) {
  const int32_t owner = parameter.owner;
  FeedForwardSlots* mlp = &slots.dense;
  if (owner == kSharedOwner) mlp = &slots.shared;
  const bool is_mlp = IsMlp(parameter.place);
  if (is_mlp && owner >= 0) {
    if (slots.experts.size() <= static_cast<size_t>(owner)) {
      slots.experts.resize(static_cast<size_t>(owner) + 1);
    }
    mlp = &slots.experts[static_cast<size_t>(owner)];
  }
  switch (parameter.place) {
    case WeightPlace::kInputNorm:
      return slots.input_norm;
    case WeightPlace::kPostAttentionNorm:
      return slots.post_attention_norm;
    case WeightPlace::kQ:
      return slots.q;
    case WeightPlace::kK:
      return slots.k;
    case WeightPlace::kV:
      return slots.v;
    case WeightPlace::kO:
      return slots.o;
    case WeightPlace::kQBias:
      return slots.q_bias;
    case WeightPlace::kKBias:
      return slots.k_bias;
    case WeightPlace::kVBias:
      return slots.v_bias;
    case WeightPlace::kOBias:
      return slots.o_bias;
    case WeightPlace::kQNorm:
      return slots.q_norm;
    case WeightPlace::kKNorm:
      return slots.k_norm;
    case WeightPlace::kRouter:
      return slots.router;
    case WeightPlace::kSharedRouter:
      return slots.shared_router;
    case WeightPlace::kGate:
      return mlp->gate;
    case WeightPlace::kUp:
      return mlp->up;
    case WeightPlace::kDown:
      return mlp->down;
    case WeightPlace::kFinalNorm:
      break;
  }
  throw RuntimeError("the final norm belongs to no layer");
}

}  // namespace winnow
