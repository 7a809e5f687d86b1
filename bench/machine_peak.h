// What this machine can do at most, measured in the same run as the kernels: their results are
// printed as shares of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include "base/thread_pool.h"  // ThreadPool

namespace winnow {

// Seconds of wall time of one call, or of CPU time of the calling thread when `cpu_time`: on a busy
// machine the latter does not count the time others ran.
double SecondsOf(const std::function<void()>& call, bool cpu_time);

// One burst of f32 FMAs on registers per thread with the vectors of `isa`; returns the operations
// done (2 per FMA and lane).
double FmaBurst(std::string_view isa, ThreadPool& pool);

}  // namespace winnow
