// Which tensors a quantised checkpoint has and where they lie: first the experts' extents, layer by
// layer, then other packed matrices, then what is copied as it is. Files hold whole layers of
// extents and about kPackedShardBytes each; a small model is one file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "quantize/packed_writer.h"  // Model, QuantizePlan, PackedMatrix

namespace winnow {

inline constexpr uint64_t kPackedShardBytes = uint64_t{4} << 30;

struct PackedTensor {
  TensorInfo info;  // as it will be
  // What is copied into it (null: it is made by the quantiser), and from where.
  const TensorInfo* source = nullptr;
  uint64_t source_offset = 0;
  uint64_t source_bytes = 0;  // the rest up to info.bytes is zeros
  // What the quantiser makes: an expert, or with expert -1 a matrix.
  int64_t layer = -1;
  int64_t expert = -1;
  PackedMatrix matrix = PackedMatrix::kQ;
};

struct PackedShard {
  std::string file_name;
  std::string header;
  std::vector<PackedTensor> tensors;
  uint64_t bytes = 0;  // of the whole file
};

// gate, up and down of an expert in a format, without the padding of its extent.
uint64_t PackedExpertBytes(const FeedForwardSlices& expert, const PackedFormat& format);

// The plan must have been checked (CheckQuantizePlan).
std::vector<PackedShard> LayOutPacked(const Model& model, const QuantizePlan& plan);

// Every matrix of a layer that the plan packs and that is no expert's, in a fixed order.
std::vector<PackedMatrix> PackedMatricesOf(const QuantizePlan& plan, int64_t layer);

}  // namespace winnow
