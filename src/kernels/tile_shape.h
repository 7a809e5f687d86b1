// The tile of Y a product computes at once, per instruction set: private to kernels/.
#pragma once

#include <cstdint>

namespace winnow {

// Columns of X (and of W) that are summed before the partial sum is added to Y. One constant for
// every instruction set and size, because it fixes the order of the sums. 256 keeps the widened
// W tile ([256, 16] f32 is 16 KiB) in half of a 32 KiB L1 cache.
inline constexpr int64_t kBlockColumns = 256;

struct TileShape {
  int64_t rows;     // rows of X in a panel
  int64_t columns;  // rows of W widened at once: two vectors
};

// Of the instruction set that runs now.
TileShape ActiveTileShape();

}  // namespace winnow
