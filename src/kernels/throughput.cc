#include "kernels/throughput.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace winnow {

double MeasureMatMulGigaFlops(ThreadPool& pool, ComputePrecision precision) {
  constexpr int64_t kRows = 512, kWidth = 1024;
  constexpr double kSeconds = 0.08;  // enough for clocks and threads to settle
  const std::vector<float> x(static_cast<size_t>(kRows * kWidth), 0.5f);
  const std::vector<uint16_t> weights(static_cast<size_t>(kWidth * kWidth), 0x3f00);  // 0.5
  std::vector<float> y(static_cast<size_t>(kRows * kWidth));
  const WeightMatrix w{std::as_bytes(std::span(weights)).data(), kWidth, kWidth, Dtype::kBF16};
  PackedRows packed;
  packed.Pack(x.data(), kRows, kWidth, kWidth, pool);
  double best = 0;
  for (double total = 0; total < kSeconds;) {
    const auto start = std::chrono::steady_clock::now();
    MatMul(packed, w, y.data(), kWidth, pool, precision);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2e-9 * kRows * kWidth * kWidth / std::max(seconds, 1e-9));
    total += std::max(seconds, 1e-4);
  }
  return best;
}

}  // namespace winnow
