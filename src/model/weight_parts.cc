#include "model/weight_parts.h"

#include <algorithm>
#include <array>

namespace winnow {
namespace {

constexpr std::array kParts = {"experts", "attention", "shared expert", "dense",
                               "router",  "lm_head",   "embedding"};

class PartTable {
 public:
  void Add(const std::string& part, const TensorSlice& slice, PackedFormat format) {
    if (!slice.exists()) return;
    if (format.empty()) format = slice.packed;
    const std::string name =
        format.empty() ? std::string(DtypeName(slice.tensor->dtype)) : PackedFormatName(format);
    auto it = std::find_if(parts_.begin(), parts_.end(), [&](const WeightPart& each) {
      return each.part == part && each.format == name;
    });
    if (it == parts_.end()) it = parts_.insert(it, {.part = part, .format = name});
    ++it->matrices;
    it->weights += static_cast<uint64_t>(slice.rows) * static_cast<uint64_t>(slice.cols);
    it->bytes += format.empty() ? slice.bytes() : PackedBytes(format, slice.rows, slice.cols);
  }
  void Add(const std::string& part, const FeedForwardSlices& slices, const PackedFormat& format) {
    for (const TensorSlice* slice : {&slices.gate, &slices.up, &slices.down}) {
      Add(part, *slice, format);
    }
  }
  std::vector<WeightPart> Sorted() {
    const auto rank = [](const WeightPart& part) {
      return std::find(kParts.begin(), kParts.end(), part.part) - kParts.begin();
    };
    std::stable_sort(parts_.begin(), parts_.end(),
                     [&](const WeightPart& a, const WeightPart& b) { return rank(a) < rank(b); });
    return std::move(parts_);
  }

 private:
  std::vector<WeightPart> parts_;
};

}  // namespace

std::vector<WeightPart> WeightParts(const Model& model) {
  return WeightParts(model, std::vector<LayerFormats>(model.layers().size()), {});
}

std::vector<WeightPart> WeightParts(const Model& model, const std::vector<LayerFormats>& layers,
                                    const PackedFormat& lm_head) {
  PartTable table;
  for (size_t l = 0; l < model.layers().size(); ++l) {
    const LayerSlices& slices = model.layers()[l];
    const LayerFormats& formats = layers[l];
    for (size_t e = 0; e < slices.experts.size(); ++e) {
      table.Add("experts", slices.experts[e], formats.Expert(e));
    }
    for (const TensorSlice* slice : {&slices.q, &slices.k, &slices.v, &slices.o}) {
      table.Add("attention", *slice, formats.attention);
    }
    table.Add("shared expert", slices.shared, formats.shared);
    table.Add("dense", slices.dense, formats.dense);
    table.Add("router", slices.router, {});
    table.Add("router", slices.shared_router, {});
  }
  if (!model.config().tie_word_embeddings) table.Add("lm_head", model.lm_head(), lm_head);
  table.Add("embedding", model.embedding(), {});
  return table.Sorted();
}

}  // namespace winnow
