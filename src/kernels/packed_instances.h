// What every kernel of packed weights asks of a format: where its blocks keep what, and the
// instance for its bits. Private to kernels/.
#pragma once

#include <cstdint>

#include "base/checked_math.h"      // CeilDiv
#include "base/packed_format.h"     // PackedFormat
#include "kernels/weight_matrix.h"  // WeightMatrix

namespace winnow {

// The same for all blocks of a matrix.
struct PackedLayout {
  explicit PackedLayout(const WeightMatrix& w)
      : block_bytes(PackedBlockBytes(w.packed, w.cols)),
        codes_bytes(PackedCodesOffset(w.packed, w.cols)),
        chunks(CeilDiv(w.cols, kPackedChunkColumns)),
        chunks_per_group(w.packed.group_columns / kPackedChunkColumns),
        groups(CeilDiv(w.cols, w.packed.group_columns)),
        zero(HasLevels(w.packed) ? 128 : PackedZero(w.packed)),
        scale_factor(ScaleFactor(w.packed)),
        shift_step(ShiftStep(w.packed)),
        shifted(HasShift(w.packed)),
        with_minima(shifted || w.packed.grid == PackedGrid::kAsymmetric) {}
  uint64_t block_bytes, codes_bytes;  // codes_bytes: where codes begin in a block
  int64_t chunks, chunks_per_group, groups;
  int32_t zero;  // what is taken from a code, or from a level plus 128
  float scale_factor, shift_step;
  bool shifted;      // a group's 16 bits are scale and shift (packed_format.h)
  bool with_minima;  // something is added to a scaled code: a shift or a stored minimum
};

// Calls call.template operator()<bits, has levels>() for the format's.
template <class Call>
void WithFormat(const PackedFormat& format, const Call& call) {
  const bool levels = HasLevels(format);
  switch (format.bits) {
    case 2:
      return levels ? call.template operator()<2, true>() : call.template operator()<2, false>();
    case 3:
      return levels ? call.template operator()<3, true>() : call.template operator()<3, false>();
    case 4:
      return levels ? call.template operator()<4, true>() : call.template operator()<4, false>();
    case 5:
      return call.template operator()<5, false>();
    case 6:
      return call.template operator()<6, false>();
    case 7:
      return call.template operator()<7, false>();
    default:
      return call.template operator()<8, false>();
  }
}

}  // namespace winnow
