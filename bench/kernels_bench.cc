// How fast the kernels are on this machine, beside what the machine and two libraries can do.
//
//   kernels_bench [--threads=N] [--isa=NAME] [--rounds=N] [--only=WORD]
//
// Every case first checks its result, then times the kernel, the libraries and the machine's peak
// one after the other in every round, and keeps the best time of each: on a shared machine only
// ratios taken side by side mean something. With one thread CPU time is used, else wall time.
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "bench_main.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/matvec.h"
#include "kernels/targets.h"
#include "kernels/throughput.h"
#include "machine_peak.h"
#include "onednn_matmul.h"

namespace winnow {
namespace {

struct Options {
  int threads = 1;
  int rounds = 7;
  std::string only;
};

struct Timer {
  bool cpu_time;
  double best = std::numeric_limits<double>::infinity();
  void Time(const std::function<void()>& call) { best = std::min(best, SecondsOf(call, cpu_time)); }
};

AlignedBuffer<float> RandomFloats(int64_t count, uint32_t seed) {
  AlignedBuffer<float> buffer(static_cast<size_t>(count));
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> value(-1, 1);
  for (float& v : buffer.span()) v = value(random);
  return buffer;
}

// A weight in one stored format, with its own bytes.
struct StoredWeight {
  AlignedBuffer<std::byte> bytes;
  WeightMatrix view;
};

StoredWeight Store(const AlignedBuffer<float>& values, int64_t n, int64_t k, Dtype dtype) {
  StoredWeight w;
  const size_t element = DtypeBits(dtype) / 8;
  w.bytes = AlignedBuffer<std::byte>(values.size() * element);
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == Dtype::kF32) {
      std::memcpy(&w.bytes[i * 4], &values[i], 4);
      continue;
    }
    const uint16_t bits =
        dtype == Dtype::kBF16 ? Bf16FromFloat(values[i]) : F16FromFloat(values[i]);
    std::memcpy(&w.bytes[i * 2], &bits, 2);
  }
  w.view = {.data = w.bytes.data(), .rows = n, .cols = k, .dtype = dtype};
  return w;
}

// Compares 200 elements spread over y with double-precision sums; ends the program if one is off.
void Check(const char* what, const float* x, const WeightMatrix& w, int64_t rows, const float* y) {
  std::minstd_rand random(7);
  for (int s = 0; s < 200; ++s) {
    const auto i = static_cast<int64_t>(random()) % rows;
    const auto j = static_cast<int64_t>(random()) % w.rows;
    double sum = 0;
    double magnitude = 0;
    for (int64_t k = 0; k < w.cols; ++k) {
      const double term =
          static_cast<double>(x[i * w.cols + k]) *
          static_cast<double>(LoadAsFloat(w.dtype, w.data, static_cast<size_t>(j * w.cols + k)));
      sum += term;
      magnitude += std::fabs(term);
    }
    // Each of k terms is rounded once or twice: |error| <= k 2^-24 sum |x w|.
    const double bound = static_cast<double>(w.cols) * 0x1p-24 * magnitude;
    const double got = static_cast<double>(y[i * w.rows + j]);
    if (!(std::fabs(got - sum) <= bound)) {
      std::printf("WRONG %s at [%ld, %ld]: %g, expected %g\n", what, static_cast<long>(i),
                  static_cast<long>(j), got, sum);
      std::exit(1);
    }
  }
}

// Products of bf16 pairs, where the CPU has them: ours round X while they run, the library's X is
// rounded beforehand.
void BenchBf16(const char* name, const PackedRows& packed, const WeightMatrix& w, float* x,
               float* w_floats, float* y, const Options& options, ThreadPool& pool) {
  const int64_t rows = packed.rows(), n = w.rows, k = w.cols;
  const bool cpu = options.threads == 1;
  MatMul(packed, w, y, n, pool, ComputePrecision::kAuto);
  std::vector<float> rounded(static_cast<size_t>(rows * k));
  for (size_t i = 0; i < rounded.size(); ++i) rounded[i] = FloatFromBf16(Bf16FromFloat(x[i]));
  Check(name, rounded.data(), w, rows, y);
  OneDnnMatMul onednn(dnnl::memory::data_type::bf16, x, w_floats, y, rows, n, k);
  Timer ours{cpu}, library{cpu};
  for (int round = 0; round < options.rounds; ++round) {
    ours.Time([&] { MatMul(packed, w, y, n, pool, ComputePrecision::kAuto); });
    library.Time([&] { onednn.Run(); });
  }
  const double flops = 2.0 * static_cast<double>(rows * n) * static_cast<double>(k) * 1e-9;
  std::printf("%-22s        | bf16 pairs %6.1f | oneDNN bf16 %6.1f | x%4.2f\n", "",
              flops / ours.best, flops / library.best, library.best / ours.best);
}

void BenchMatMul(const char* name, int64_t rows, int64_t n, int64_t k, const Options& options,
                 ThreadPool& pool) {
  if (!options.only.empty() && std::string_view(name).find(options.only) == std::string_view::npos)
    return;
  AlignedBuffer<float> x = RandomFloats(rows * k, 1);
  AlignedBuffer<float> w = RandomFloats(n * k, 2);
  AlignedBuffer<float> y(static_cast<size_t>(rows * n));
  const StoredWeight f32 = Store(w, n, k, Dtype::kF32);
  const StoredWeight bf16 = Store(w, n, k, Dtype::kBF16);
  const StoredWeight f16 = Store(w, n, k, Dtype::kF16);
  PackedRows packed;
  packed.Pack(x.data(), rows, k, k, pool);
  for (const StoredWeight* stored : {&f32, &bf16, &f16}) {
    MatMul(packed, stored->view, y.data(), n, pool);
    Check(name, x.data(), stored->view, rows, y.data());
  }
  OneDnnMatMul onednn(dnnl::memory::data_type::f32, x.data(), w.data(), y.data(), rows, n, k);
  const auto sgemm = [&] {
    dnnl_sgemm('N', 'T', rows, n, k, 1.0f, x.data(), k, w.data(), k, 0.0f, y.data(), n);
  };
  const auto openblas = [&] {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows),
                static_cast<int>(n), static_cast<int>(k), 1.0f, x.data(), static_cast<int>(k),
                w.data(), static_cast<int>(k), 0.0f, y.data(), static_cast<int>(n));
  };
  const bool cpu = options.threads == 1;
  Timer peak{cpu}, pack{cpu}, ours_f32{cpu}, ours_bf16{cpu}, ours_f16{cpu}, dnn_sgemm{cpu},
      dnn_matmul{cpu}, blas{cpu};
  double peak_flops = 0;
  const std::string isa = ActiveIsa();
  for (int round = 0; round < options.rounds; ++round) {
    peak.Time([&] { peak_flops = FmaBurst(isa, pool); });
    pack.Time([&] { packed.Pack(x.data(), rows, k, k, pool); });
    ours_bf16.Time([&] { MatMul(packed, bf16.view, y.data(), n, pool); });
    ours_f32.Time([&] { MatMul(packed, f32.view, y.data(), n, pool); });
    ours_f16.Time([&] { MatMul(packed, f16.view, y.data(), n, pool); });
    peak.Time([&] { peak_flops = FmaBurst(isa, pool); });
    dnn_matmul.Time([&] { onednn.Run(); });
    dnn_sgemm.Time(sgemm);
    blas.Time(openblas);
  }
  const double flops = 2.0 * static_cast<double>(rows * n) * static_cast<double>(k) * 1e-9;
  const double peak_rate = peak_flops * 1e-9 / peak.best;
  const double library = std::min({dnn_matmul.best, dnn_sgemm.best, blas.best});
  const auto share = [&](double seconds) { return 100 * flops / seconds / peak_rate; };
  std::printf("%-22s %6.1f | bf16 %6.1f (%4.1f%%, with pack %4.1f%%) f32 %6.1f f16 %6.1f | ", name,
              peak_rate, flops / ours_bf16.best, share(ours_bf16.best),
              share(ours_bf16.best + pack.best), flops / ours_f32.best, flops / ours_f16.best);
  std::printf("oneDNN %5.1f / %5.1f OpenBLAS %5.1f | x%4.2f of best\n", flops / dnn_matmul.best,
              flops / dnn_sgemm.best, flops / blas.best, library / (ours_bf16.best + pack.best));
  if (isa == "avx512_bf16")
    BenchBf16(name, packed, bf16.view, x.data(), w.data(), y.data(), options, pool);
  std::fflush(stdout);
}

void BenchMatVec(const char* name, int64_t rows, int64_t n, int64_t k, const Options& options,
                 ThreadPool& pool) {
  if (!options.only.empty() && std::string_view(name).find(options.only) == std::string_view::npos)
    return;
  const AlignedBuffer<float> x = RandomFloats(rows * k, 1);
  const AlignedBuffer<float> w = RandomFloats(n * k, 2);
  AlignedBuffer<float> y(static_cast<size_t>(rows * n));
  const StoredWeight bf16 = Store(w, n, k, Dtype::kBF16);
  const auto w_bytes = static_cast<int64_t>(bf16.view.bytes());
  MatVec(x.data(), rows, bf16.view, y.data(), n, pool);
  Check(name, x.data(), bf16.view, rows, y.data());
  const bool cpu = options.threads == 1;
  Timer read{cpu}, ours{cpu};
  for (int round = 0; round < options.rounds; ++round) {
    read.Time([&] { MeasureReadGigabytes({bf16.view.data, bf16.view.bytes()}, pool); });
    ours.Time([&] { MatVec(x.data(), rows, bf16.view, y.data(), n, pool); });
  }
  const double gigabytes = static_cast<double>(w_bytes) * 1e-9;
  std::printf("%-22s read %5.1f GB/s | bf16 %5.1f GB/s, %3.0f%% of read\n", name,
              gigabytes / read.best, gigabytes / ours.best, 100 * read.best / ours.best);
  std::fflush(stdout);
}

// Packed weights of random codes, scales 1: bytes of W a second beside reading them.
void BenchPacked(const char* format_name, int64_t rows, int64_t n, int64_t k,
                 const Options& options, ThreadPool& pool) {
  const std::string name = "packed " + std::string(format_name) + " x" + std::to_string(rows);
  if (!options.only.empty() && name.find(options.only) == std::string::npos) return;
  const PackedFormat format = *PackedFormatFromName(format_name);
  const AlignedBuffer<float> x = RandomFloats(rows * k, 1);
  AlignedBuffer<std::byte> bytes(PackedBytes(format, n, k));
  std::vector<uint8_t> codes(static_cast<size_t>(k));
  const std::vector<uint16_t> ones(static_cast<size_t>(k), F16FromFloat(1.0f));
  std::fill_n(bytes.data(), bytes.size(), std::byte{0});
  std::mt19937 random(3);
  for (int64_t row = 0; row < n; ++row) {
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random() % (1u << format.bits));
    StorePackedRow(format, k, row, {codes.data(), ones.data(), ones.data()}, bytes.data());
  }
  const WeightMatrix w = {
      .data = bytes.data(), .rows = n, .cols = k, .dtype = Dtype::kU8, .packed = format};
  AlignedBuffer<float> y(static_cast<size_t>(rows * n));
  MatVec(x.data(), rows, w, y.data(), n, pool);
  for (int64_t i = 0; i < rows; ++i) {
    for (const int64_t row : {int64_t{0}, n - 1}) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double term = static_cast<double>(x[static_cast<size_t>(i * k + c)]) *
                            static_cast<double>(LoadPackedValue(format, k, row, c, w.data));
        sum += term;
        magnitude += std::fabs(term);
      }
      // Activations are rounded to 1/65,024 of the largest of 32.
      if (std::fabs(static_cast<double>(y[static_cast<size_t>(i * n + row)]) - sum) >
          4e-5 * magnitude) {
        std::printf("WRONG %s\n", name.c_str());
        std::exit(1);
      }
    }
  }
  Timer read{options.threads == 1}, ours{options.threads == 1};
  for (int round = 0; round < options.rounds; ++round) {
    read.Time([&] { MeasureReadGigabytes({w.data, w.bytes()}, pool); });
    ours.Time([&] { MatVec(x.data(), rows, w, y.data(), n, pool); });
  }
  const double gigabytes = static_cast<double>(w.bytes()) * 1e-9;
  std::printf("%-22s read %5.1f GB/s | %5.1f GB/s, %3.0f%% of read, %5.1f G weights/s\n",
              name.c_str(), gigabytes / read.best, gigabytes / ours.best,
              100 * read.best / ours.best, 1e-9 * static_cast<double>(rows * n * k) / ours.best);
  std::fflush(stdout);
}

void BenchGram(const char* name, int64_t m, int64_t n, const Options& options, ThreadPool& pool) {
  if (!options.only.empty() && std::string_view(name).find(options.only) == std::string_view::npos)
    return;
  const AlignedBuffer<float> f = RandomFloats(m * n, 1);
  std::vector<float> gram(static_cast<size_t>(m * (m + 1) / 2));
  std::vector<float> expected(gram.size());
  GramUpper(f.data(), m, n, n, gram.data());
  GramUpperReference(f.data(), m, n, n, expected.data());
  for (size_t i = 0; i < gram.size(); ++i) {
    // |f| <= 1: the sum of n products is off by at most n 2^-24 n.
    if (std::fabs(gram[i] - expected[i]) > static_cast<float>(n * n) * 0x1p-24f) {
      std::printf("WRONG %s at %zu\n", name, i);
      std::exit(1);
    }
  }
  const double flops = static_cast<double>(m * (m + 1)) * static_cast<double>(n);
  const int repeats = static_cast<int>(5e7 / flops) + 1;
  Timer peak{true}, ours{true};
  double peak_flops = 0;
  for (int round = 0; round < options.rounds; ++round) {
    peak.Time([&] { peak_flops = FmaBurst(ActiveIsa(), pool); });
    ours.Time([&] {
      for (int i = 0; i < repeats; ++i) GramUpper(f.data(), m, n, n, gram.data());
    });
  }
  const double rate = flops * repeats * 1e-9 / ours.best;
  std::printf("%-22s %6.1f | %6.1f (%4.1f%%)\n", name, peak_flops * 1e-9 / peak.best, rate,
              100 * rate / (peak_flops * 1e-9 / peak.best));
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string key = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (key == "--threads") {
      options.threads = std::atoi(value.c_str());
    } else if (key == "--rounds") {
      options.rounds = std::atoi(value.c_str());
    } else if (key == "--isa") {
      SelectIsa(value);
    } else if (key == "--only") {
      options.only = value;
    } else {
      std::printf("kernels_bench [--threads=N] [--isa=NAME] [--rounds=N] [--only=WORD]\n");
      return 2;
    }
  }
  ThreadPool pool(options.threads);
  omp_set_num_threads(options.threads);
  openblas_set_num_threads(options.threads);
  std::printf("isa %s, %d thread(s), best of %d rounds; GFLOP/s; first column: FMA peak\n",
              ActiveIsa().c_str(), options.threads, options.rounds);
  BenchMatMul("sample up 8192", 8192, 256, 128, options, pool);
  BenchMatMul("sample down 8192", 8192, 128, 256, options, pool);
  BenchMatMul("sample up 512", 512, 256, 128, options, pool);
  BenchMatMul("sample down 512", 512, 128, 256, options, pool);
  BenchMatMul("olmoe up 512", 512, 1024, 2048, options, pool);
  BenchMatMul("olmoe down 512", 512, 2048, 1024, options, pool);
  BenchMatMul("olmoe up 64", 64, 1024, 2048, options, pool);
  BenchMatMul("olmoe up 8", 8, 1024, 2048, options, pool);
  BenchMatMul("mixtral up 512", 512, 14336, 4096, options, pool);
  BenchMatMul("mixtral down 512", 512, 4096, 14336, options, pool);
  for (const int64_t rows : {1, 2, 3, 4, 8}) {
    const std::string name = "matvec mixtral x" + std::to_string(rows);
    BenchMatVec(name.c_str(), rows, 14336, 4096, options, pool);
  }
  for (const char* format : {"8bit", "6bit", "4bit", "4bit-log", "3bit", "2bit"}) {
    for (const int64_t rows : {1, 2, 4, 8}) {
      BenchPacked(format, rows, 14336, 4096, options, pool);
    }
  }
  BenchGram("gram 8 x 128", 8, 128, options, pool);
  BenchGram("gram 16 x 1024", 16, 1024, options, pool);
  BenchGram("gram 64 x 2048", 64, 2048, options, pool);
  return 0;
}

}  // namespace
}  // namespace winnow

int main(int argc, char** argv) {
  return winnow::RunBenchmark(winnow::Main, argc, argv);
}
