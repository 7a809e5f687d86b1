#include "machine_peak.h"

#include <immintrin.h>
#include <time.h>

#include <algorithm>

namespace winnow {
namespace {

constexpr int kFmaRounds = 400000;
constexpr int kChains = 12;  // latency 4 and two units need 8

double Seconds(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Twelve independent chains in registers; the empty assembly makes the compiler keep every step.
#define WINNOW_FMA_CHAINS(Vector, set1, fmadd, constraint)                                         \
  const Vector a = set1(0.5f);                                                                     \
  Vector s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a;                                           \
  Vector s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;                                         \
  for (int i = 0; i < kFmaRounds; ++i) {                                                           \
    s0 = fmadd(s0, a, a), s1 = fmadd(s1, a, a), s2 = fmadd(s2, a, a), s3 = fmadd(s3, a, a);        \
    s4 = fmadd(s4, a, a), s5 = fmadd(s5, a, a), s6 = fmadd(s6, a, a), s7 = fmadd(s7, a, a);        \
    s8 = fmadd(s8, a, a), s9 = fmadd(s9, a, a), s10 = fmadd(s10, a, a);                            \
    s11 = fmadd(s11, a, a);                                                                        \
    asm volatile(""                                                                                \
                 : "+" constraint(s0), "+" constraint(s1), "+" constraint(s2), "+" constraint(s3), \
                   "+" constraint(s4), "+" constraint(s5), "+" constraint(s6), "+" constraint(s7), \
                   "+" constraint(s8), "+" constraint(s9), "+" constraint(s10),                    \
                   "+" constraint(s11));                                                           \
  }

float MulAdd(float x, float y, float z) {
  return x * y + z;
}

__attribute__((target("avx2,fma"))) void FmaAvx2() {
  WINNOW_FMA_CHAINS(__m256, _mm256_set1_ps, _mm256_fmadd_ps, "x")
}
__attribute__((target("avx512f"))) void FmaAvx512() {
  WINNOW_FMA_CHAINS(__m512, _mm512_set1_ps, _mm512_fmadd_ps, "v")
}
void MulAddScalar() {
  WINNOW_FMA_CHAINS(float, float, MulAdd, "x")
}

#undef WINNOW_FMA_CHAINS

}  // namespace

double SecondsOf(const std::function<void()>& call, bool cpu_time) {
  const clockid_t clock = cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
  const double start = Seconds(clock);
  call();
  return Seconds(clock) - start;
}

double FmaBurst(std::string_view isa, ThreadPool& pool) {
  const bool avx2 = isa == "avx2";
  const bool avx512 = isa.starts_with("avx512");
  pool.Run(pool.num_threads(), [&](int64_t, int) {
    if (avx512) {
      FmaAvx512();
    } else if (avx2) {
      FmaAvx2();
    } else {
      MulAddScalar();
    }
  });
  const int lanes = avx512 ? 16 : avx2 ? 8 : 1;
  return 2.0 * kFmaRounds * kChains * lanes * pool.num_threads();
}

}  // namespace winnow
