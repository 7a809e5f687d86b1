// How fast this machine multiplies right now, for estimates of time before long work. Never decides
// a result.
#pragma once

#include "base/thread_pool.h"  // ThreadPool
#include "kernels/matmul.h"    // ComputePrecision

namespace winnow {

// GFLOP/s of products on all threads of `pool`, bf16 weights; takes about a tenth of a second.
double MeasureMatMulGigaFlops(ThreadPool& pool, ComputePrecision precision);

}  // namespace winnow
