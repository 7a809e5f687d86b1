// How fast this machine multiplies and reads memory right now: for estimates of time before long
// work, and to print beside measured speeds. Never decides a result.
#pragma once

#include <cstddef>
#include <span>

#include "base/thread_pool.h"  // ThreadPool
#include "kernels/matmul.h"    // ComputePrecision

namespace winnow {

// GFLOP/s of products on all threads of `pool`, bf16 weights; takes about a tenth of a second.
double MeasureMatMulGigaFlops(ThreadPool& pool, ComputePrecision precision);

// GB/s (10^9) of reading `memory` once in order, split among all threads of `pool`: the bandwidth
// of RAM if it is several times larger than the caches. The pages must have been written before.
double MeasureReadGigabytes(std::span<const std::byte> memory, ThreadPool& pool);

}  // namespace winnow
