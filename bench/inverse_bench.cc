// How fast the inverse Cholesky factor of compensated rounding is, beside OpenBLAS and the machine.
//
//   inverse_bench [--threads=N] [--isa=NAME] [--rounds=N] [--size=N]
//
// Sizes are the inputs of matrices: hidden sizes and expert widths. Every case first checks its
// result against OpenBLAS (dpotrf, dtrtri), then times both and the machine's peak in turns and
// keeps the best time of each. With one thread CPU time is used, else wall time.
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "bench_main.h"
#include "kernels/inverse.h"
#include "kernels/targets.h"
#include "machine_peak.h"

extern "C" {
void dpotrf_(const char* triangle, const int* n, double* a, const int* ld, int* info);
void dtrtri_(const char* triangle, const char* diagonal, const int* n, double* a, const int* ld,
             int* info);
}

namespace winnow {
namespace {

// A diagonally dominant symmetric matrix with random correlations.
std::vector<double> RandomMoments(int64_t n) {
  std::vector<double> a(static_cast<size_t>(n * n));
  std::minstd_rand random(1);
  std::uniform_real_distribution<double> value(-1, 1);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c <= r; ++c) {
      const double v = r == c ? static_cast<double>(n) : value(random);
      a[static_cast<size_t>(r * n + c)] = a[static_cast<size_t>(c * n + r)] = v;
    }
  }
  return a;
}

// A row-major lower triangle is a column-major upper one: U = L^T, whose inverse is (L^-1)^T.
void InverseByLapack(double* a, int64_t n) {
  const int size = static_cast<int>(n);
  int info = 0;
  dpotrf_("U", &size, a, &size, &info);
  if (info == 0) dtrtri_("U", "N", &size, a, &size, &info);
  if (info != 0) throw RuntimeError("OpenBLAS found no inverse", "");
}

void Measure(int64_t n, int threads, int rounds) {
  ThreadPool pool(threads);
  openblas_set_num_threads(threads);
  const std::vector<double> moments = RandomMoments(n);
  std::vector<double> ours = moments, theirs = moments;
  if (!InverseCholeskyFactor(ours.data(), n, pool)) throw RuntimeError("no inverse", "");
  InverseByLapack(theirs.data(), n);
  double difference = 0, largest = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c <= r; ++c) {
      const auto at = static_cast<size_t>(r * n + c);
      difference = std::max(difference, std::abs(ours[at] - theirs[at]));
      largest = std::max(largest, std::abs(theirs[at]));
    }
  }
  if (!(difference < 1e-12 * largest)) throw RuntimeError("the results differ", "");
  const bool cpu_time = threads == 1;
  double best = std::numeric_limits<double>::infinity(), best_lapack = best, peak = 0;
  for (int round = 0; round < rounds; ++round) {
    ours = moments;
    best =
        std::min(best, SecondsOf([&] { InverseCholeskyFactor(ours.data(), n, pool); }, cpu_time));
    theirs = moments;
    best_lapack =
        std::min(best_lapack, SecondsOf([&] { InverseByLapack(theirs.data(), n); }, cpu_time));
    double operations = 0;
    const double seconds = SecondsOf([&] { operations = FmaBurst(ActiveIsa(), pool); }, cpu_time);
    peak = std::max(peak, operations / seconds / 2);  // half as many doubles as floats
  }
  const double operations =
      2.0 / 3.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n);
  std::printf("%6lld  %9.1f GFLOP/s  %3.0f %% of the machine's doubles  OpenBLAS %9.1f  %.2fx\n",
              static_cast<long long>(n), operations / best * 1e-9, 100 * operations / best / peak,
              operations / best_lapack * 1e-9, best_lapack / best);
}

int Main(int argc, char** argv) {
  int threads = 1, rounds = 5;
  std::vector<int64_t> sizes = {1024, 2048, 4096};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&](const char* name) {
      const std::string prefix = std::string("--") + name + "=";
      return argument.starts_with(prefix) ? argument.substr(prefix.size()) : std::string();
    };
    if (!value("threads").empty()) threads = std::stoi(value("threads"));
    if (!value("rounds").empty()) rounds = std::stoi(value("rounds"));
    if (!value("size").empty()) sizes = {std::stoll(value("size"))};
    if (!value("isa").empty()) SelectIsa(value("isa"));
  }
  std::printf(
      "inverse Cholesky factor in double, %d thread(s), best of %d; checked against OpenBLAS\n",
      threads, rounds);
  for (const int64_t n : sizes) Measure(n, threads, rounds);
  return 0;
}

}  // namespace
}  // namespace winnow

int main(int argc, char** argv) {
  return winnow::RunBenchmark(winnow::Main, argc, argv);
}
