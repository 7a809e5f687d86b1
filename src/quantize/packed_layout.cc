#include "quantize/packed_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_set>

#include "base/checked_math.h"
#include "checkpoint/safetensors_writer.h"
#include "model/layer_formats.h"

namespace winnow {
namespace {

constexpr const char* kWhat = "a quantised checkpoint";

uint64_t RoundUp(uint64_t bytes, uint64_t alignment) {
  return CheckedAdd(bytes, alignment - 1, kWhat) / alignment * alignment;
}

class LayoutBuilder {
 public:
  LayoutBuilder(const Model& model, const QuantizePlan& plan)
      : model_(model), plan_(plan), stored_(StoredFormats(model, plan)) {}

  std::vector<PackedShard> Build() {
    FindAlignment();
    for (size_t l = 0; l < model_.layers().size(); ++l) AddExtents(l);
    for (int64_t l = 0; l < std::ssize(model_.layers()); ++l) {
      for (const PackedMatrix matrix : PackedMatricesOf(plan_, l)) AddMatrix(l, matrix);
    }
    if (!plan_.lm_head.empty()) AddMatrix(-1, PackedMatrix::kLmHead);
    AddCopies();
    uint64_t rest = 0;
    for (const PackedTensor& tensor : others_) rest += tensor.info.bytes;
    if (shards_.empty() || Bytes(shards_.back()) + rest > kPackedShardBytes) shards_.emplace_back();
    for (PackedTensor& tensor : others_) {
      if (!shards_.back().tensors.empty() &&
          Bytes(shards_.back()) + tensor.info.bytes > kPackedShardBytes) {
        shards_.emplace_back();
      }
      Put(std::move(tensor), shards_.back());
    }
    Name();
    return std::move(shards_);
  }

 private:
  // One alignment for all: an extent of another size in between would shift those behind it.
  void FindAlignment() {
    for (size_t l = 0; l < model_.layers().size(); ++l) {
      const LayerSlices& layer = model_.layers()[l];
      for (size_t e = 0; e < layer.experts.size(); ++e) {
        const PackedFormat& format = stored_.layers[l].experts[e];
        if (format.empty()) continue;
        if (PackedExpertBytes(layer.experts[e], format) >= kLargeExtentBytes) {
          alignment_ = kExtentAlignment;
        }
      }
    }
  }

  static uint64_t Bytes(const PackedShard& shard) { return shard.bytes; }
  static void Put(PackedTensor tensor, PackedShard& shard) {
    shard.bytes = CheckedAdd(shard.bytes, tensor.info.bytes, kWhat);
    shard.tensors.push_back(std::move(tensor));
  }
  static TensorInfo PackedInfo(std::string name, uint64_t bytes) {
    return {.name = std::move(name), .dtype = Dtype::kU8, .shape = {bytes}, .bytes = bytes};
  }

  void AddExtents(size_t l) {
    const LayerSlices& layer = model_.layers()[l];
    PackedShard extents;
    bool any_new = false;
    for (size_t e = 0; e < layer.experts.size(); ++e) {
      const PackedFormat& format = stored_.layers[l].experts[e];
      if (format.empty()) continue;
      const FeedForwardSlices& expert = layer.experts[e];
      const auto layer_id = static_cast<int64_t>(l), expert_id = static_cast<int64_t>(e);
      PackedTensor tensor;
      tensor.info = PackedInfo(model_.PackedExpertName(layer_id, expert_id),
                               RoundUp(PackedExpertBytes(expert, format), alignment_));
      if (expert.gate.packed.empty()) {
        tensor.layer = layer_id;
        tensor.expert = expert_id;
        any_new = true;
        Replace(expert);
      } else {  // without its padding, which may be another now
        tensor.source = expert.gate.tensor;
        tensor.source_bytes = PackedExpertBytes(expert, format);
        replaced_.insert(expert.gate.tensor);
      }
      Put(std::move(tensor), extents);
    }
    if (any_new) SplitFused(l);
    if (extents.tensors.empty()) return;
    if (shards_.empty() || Bytes(shards_.back()) + Bytes(extents) > kPackedShardBytes) {
      shards_.emplace_back();
    }
    for (PackedTensor& tensor : extents.tensors) Put(std::move(tensor), shards_.back());
  }

  void Replace(const FeedForwardSlices& part) {
    for (const TensorSlice* slice : {&part.gate, &part.up, &part.down}) {
      replaced_.insert(slice->tensor);
    }
  }

  // Experts that stay as they are beside packed ones, out of tensors that hold all of a layer.
  void SplitFused(size_t l) {
    const LayerSlices& layer = model_.layers()[l];
    const FamilyTensorNames& names = model_.config().family->names;
    for (size_t e = 0; e < layer.experts.size(); ++e) {
      const FeedForwardSlices& expert = layer.experts[e];
      if (!stored_.layers[l].experts[e].empty() || !replaced_.contains(expert.gate.tensor))
        continue;
      const auto add = [&](const TensorSlice& slice, std::string_view pattern) {
        PackedTensor tensor;
        tensor.info = {
            .name = model_.TensorName(static_cast<int64_t>(l), pattern, static_cast<int64_t>(e)),
            .dtype = slice.tensor->dtype,
            .shape = {static_cast<uint64_t>(slice.rows), static_cast<uint64_t>(slice.cols)},
            .bytes = slice.bytes()};
        tensor.source = slice.tensor;
        tensor.source_offset = slice.offset_bytes;
        tensor.source_bytes = slice.bytes();
        split_.push_back(std::move(tensor));
      };
      add(expert.gate, names.expert_gate);
      add(expert.up, names.expert_up);
      add(expert.down, names.expert_down);
    }
  }

  void AddMatrix(int64_t layer, PackedMatrix matrix) {
    const TensorSlice& slice = SliceOf(model_, layer, matrix);
    PackedTensor tensor;
    tensor.info = PackedInfo(PackedTensorName(slice.tensor->name),
                             PackedBytes(FormatOf(plan_, layer, matrix), slice.rows, slice.cols));
    tensor.layer = layer;
    tensor.matrix = matrix;
    others_.push_back(std::move(tensor));
    replaced_.insert(slice.tensor);
  }

  // Packed ones first: sizes of others may be odd.
  void AddCopies() {
    std::unordered_set<const TensorInfo*> packed;
    for (int64_t l = 0; l < std::ssize(model_.layers()); ++l) {
      for (const PackedMatrix matrix :
           {PackedMatrix::kQ, PackedMatrix::kK, PackedMatrix::kV, PackedMatrix::kO,
            PackedMatrix::kSharedGate, PackedMatrix::kSharedUp, PackedMatrix::kSharedDown,
            PackedMatrix::kDenseGate, PackedMatrix::kDenseUp, PackedMatrix::kDenseDown,
            PackedMatrix::kLmHead}) {
        const TensorSlice& slice = SliceOf(model_, l, matrix);
        if (!slice.packed.empty()) packed.insert(slice.tensor);
      }
    }
    for (const bool first : {true, false}) {
      for (const TensorInfo& tensor : model_.checkpoint().tensors()) {
        if (replaced_.contains(&tensor) || packed.contains(&tensor) != first) continue;
        PackedTensor copy;
        copy.info = {.name = tensor.name,
                     .dtype = tensor.dtype,
                     .shape = tensor.shape,
                     .bytes = tensor.bytes};
        copy.source = &tensor;
        copy.source_bytes = tensor.bytes;
        others_.push_back(std::move(copy));
      }
    }
    for (PackedTensor& tensor : split_) others_.push_back(std::move(tensor));
  }

  void Name() {
    for (size_t i = 0; i < shards_.size(); ++i) {
      PackedShard& shard = shards_[i];
      shard.file_name = shards_.size() == 1 ? "model.safetensors"
                                            : fmt::format("model-{:05d}-of-{:05d}.safetensors",
                                                          i + 1, shards_.size());
      std::vector<TensorInfo> infos;
      for (const PackedTensor& tensor : shard.tensors) infos.push_back(tensor.info);
      // Data begin at a page: extents are aligned in the file, not only among themselves.
      shard.header = LayOutSafetensors(infos, {{"format", "pt"}}, 0);
      shard.bytes += shard.header.size();
      for (size_t t = 0; t < infos.size(); ++t) shard.tensors[t].info = infos[t];
    }
  }

  const Model& model_;
  const QuantizePlan& plan_;
  const QuantizePlan stored_;
  uint64_t alignment_ = kPackedAlignment;
  std::vector<PackedShard> shards_;
  std::vector<PackedTensor> others_, split_;
  std::unordered_set<const TensorInfo*> replaced_;  // tensors of the source that are not copied
};

}  // namespace

uint64_t PackedExpertBytes(const FeedForwardSlices& expert, const PackedFormat& format) {
  const auto one = [&](const TensorSlice& slice) {
    return PackedBytes(format, slice.rows, slice.cols);
  };
  return CheckedAdd(CheckedAdd(one(expert.gate), one(expert.up), kWhat), one(expert.down), kWhat);
}

std::vector<PackedMatrix> PackedMatricesOf(const QuantizePlan& plan, int64_t layer) {
  std::vector<PackedMatrix> matrices;
  for (const PackedMatrix matrix :
       {PackedMatrix::kQ, PackedMatrix::kK, PackedMatrix::kV, PackedMatrix::kO,
        PackedMatrix::kSharedGate, PackedMatrix::kSharedUp, PackedMatrix::kSharedDown,
        PackedMatrix::kDenseGate, PackedMatrix::kDenseUp, PackedMatrix::kDenseDown}) {
    if (!FormatOf(plan, layer, matrix).empty()) matrices.push_back(matrix);
  }
  return matrices;
}

std::vector<PackedShard> LayOutPacked(const Model& model, const QuantizePlan& plan) {
  return LayoutBuilder(model, plan).Build();
}

}  // namespace winnow
