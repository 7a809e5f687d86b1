#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels/throughput.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/read_memory.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// A number nobody wants, which depends on every byte.
uint64_t ReadAll(const std::byte* data, size_t bytes) {
  const hn::ScalableTag<uint64_t> d;
  const size_t step = hn::Lanes(d) * sizeof(uint64_t);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  size_t i = 0;
  for (; i + 4 * step <= bytes; i += 4 * step) {
    __builtin_prefetch(data + i + 4096);
    a = hn::Xor(a, hn::LoadU(d, As<uint64_t>(data + i)));
    b = hn::Xor(b, hn::LoadU(d, As<uint64_t>(data + i + step)));
    c = hn::Xor(c, hn::LoadU(d, As<uint64_t>(data + i + 2 * step)));
    e = hn::Xor(e, hn::LoadU(d, As<uint64_t>(data + i + 3 * step)));
  }
  HWY_ALIGN uint64_t lanes[HWY_MAX_BYTES / sizeof(uint64_t)] = {};
  hn::Store(hn::Xor(hn::Xor(a, b), hn::Xor(c, e)), d, lanes);
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum ^= lane;
  for (; i < bytes; ++i) sum += static_cast<uint64_t>(data[i]);
  return sum;
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(ReadAll);

double MeasureReadGigabytes(std::span<const std::byte> memory, ThreadPool& pool) {
  constexpr size_t kPart = 1 << 20;
  std::atomic<uint64_t> sum{0};
  const auto start = std::chrono::steady_clock::now();
  pool.Run(static_cast<int64_t>((memory.size() + kPart - 1) / kPart), [&](int64_t part, int) {
    const size_t from = static_cast<size_t>(part) * kPart;
    sum +=
        HWY_DYNAMIC_DISPATCH(ReadAll)(memory.data() + from, std::min(kPart, memory.size() - from));
  });
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  // The sum is used, so that no compiler drops the reading.
  const double nothing = sum.load() == 1 ? 1e-30 : 0.0;
  return static_cast<double>(memory.size()) * 1e-9 / std::max(seconds, 1e-9) + nothing;
}

}  // namespace winnow
#endif  // HWY_ONCE
