// In which packed format each matrix of a layer is stored: what `quantization_config` of
// config.json says, and what a quantiser is told to make. An empty format is a matrix as it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/packed_format.h"  // PackedFormat

namespace winnow {

// A packed expert is one tensor, gate, up and down one after the other and zeros up to a multiple
// of kPackedAlignment; or of kExtentAlignment, so that it can be read past the page cache, in
// models that have an expert of kLargeExtentBytes.
inline constexpr uint64_t kExtentAlignment = 4096;
inline constexpr uint64_t kLargeExtentBytes = uint64_t{256} << 10;

struct LayerFormats {
  std::vector<PackedFormat> experts;  // [E] of MoE and condensed layers, or none: all as they are
  PackedFormat attention;             // q, k, v, o
  PackedFormat shared;                // the shared expert
  PackedFormat dense;                 // the SwiGLU of a layer without experts, or of a fused one

  PackedFormat Expert(size_t expert) const {
    return expert < experts.size() ? experts[expert] : PackedFormat{};
  }
  bool operator==(const LayerFormats&) const = default;
};

}  // namespace winnow
