// How fast this machine multiplies right now, for estimates of time before long work. Never decides
// a result.
#pragma once

#include "base/thread_pool.h"  // ThreadPool
#include "kernels/matmul.h"    // ComputePrecision

namespace winnow {

// GFLOP/s of a product of a few milliseconds on all threads of `pool`, bf16 weights.
double MeasureMatMulGigaFlops(ThreadPool& pool, ComputePrecision precision);

}  // namespace winnow
