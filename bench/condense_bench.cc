// What condensing gains and costs in DeepSeekMoE-16B's shape (hidden 2048, 64 experts of 1408,
// shared expert of 2816, 6 experts a token, condensed to 6 + shared):
//
//   the condensed layer's feed-forward block, fused and in parts, against the best rate a library
//   (OpenBLAS, oneDNN) reaches on its products in the same run, and beside the MoE block it
//   replaces; the divergence of CD-MoE's search, nanoseconds a token, channel and candidate,
//   checked against the reference first.
//
//   condense_bench [--threads=N] [--rounds=N]
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/aligned_buffer.h"
#include "bench_main.h"
#include "forward/feed_forward.h"
#include "kernels/divergence.h"
#include "kernels/elementwise.h"
#include "kernels/targets.h"
#include "machine_peak.h"
#include "onednn_matmul.h"
#include "weights/fused_feed_forward.h"

namespace winnow {
namespace {

constexpr int64_t kHidden = 2048, kExpertWidth = 1408, kSharedWidth = 2816, kTokens = 2048;
constexpr int64_t kExperts = 64, kPerToken = 6, kKept = 6;
constexpr int64_t kFusedWidth = kSharedWidth + kKept * kExpertWidth;

class Weights {
 public:
  WeightMatrix Matrix(int64_t rows, int64_t cols) {
    AlignedBuffer<uint16_t>& data = storage_.emplace_back(static_cast<size_t>(rows * cols));
    const float scale = 1.7f / std::sqrt(static_cast<float>(cols));
    for (uint16_t& value : data.span()) value = Bf16FromFloat(Unit() * scale);
    return {reinterpret_cast<const std::byte*>(data.data()), rows, cols, Dtype::kBF16};
  }
  FeedForwardWeights Mlp(int64_t width) {
    return {Matrix(width, kHidden), Matrix(width, kHidden), Matrix(kHidden, width)};
  }
  float Unit() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

 private:
  std::vector<AlignedBuffer<uint16_t>> storage_;
  uint64_t state_ = 42;
};

// Best GFLOP/s of two libraries on the three products of the fused block, 512 rows each.
double LibraryRate(ComputePrecision precision, int threads, int rounds) {
  const int64_t rows = 512;
  double best = 0;
  for (const auto& shape : {std::pair{kFusedWidth, kHidden}, {kHidden, kFusedWidth}}) {
    const int64_t n = shape.first, k = shape.second;
    std::vector<float> x(static_cast<size_t>(rows * k), 0.5f), w(static_cast<size_t>(n * k), 0.25f),
        y(static_cast<size_t>(rows * n));
    const double flop =
        2.0 * static_cast<double>(rows) * static_cast<double>(n) * static_cast<double>(k);
    const bool bf16 = precision == ComputePrecision::kAuto;
    OneDnnMatMul matmul(bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32,
                        x.data(), w.data(), y.data(), rows, n, k);
    for (int round = 0; round < rounds; ++round) {
      best = std::max(best, flop / SecondsOf([&] { matmul.Run(); }, threads == 1) * 1e-9);
      if (bf16) continue;
      const double blas = SecondsOf(
          [&] {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows),
                        static_cast<int>(n), static_cast<int>(k), 1.0f, x.data(),
                        static_cast<int>(k), w.data(), static_cast<int>(k), 0.0f, y.data(),
                        static_cast<int>(n));
          },
          threads == 1);
      best = std::max(best, flop / blas * 1e-9);
    }
  }
  return best;
}

void BenchBlock(ComputePrecision precision, int threads, int rounds) {
  ThreadPool pool(threads);
  Weights make;
  LayerWeights moe;
  moe.post_attention_norm.assign(static_cast<size_t>(kHidden), 1.0f);
  moe.router = make.Matrix(kExperts, kHidden);
  for (int64_t e = 0; e < kExperts; ++e) moe.experts.push_back(make.Mlp(kExpertWidth));
  moe.shared = make.Mlp(kSharedWidth);
  ModelConfig config;
  config.hidden_size = kHidden;
  config.num_experts_per_tok = kPerToken;
  LayerConfig layer;
  layer.is_moe = true;
  layer.num_experts = kExperts;
  layer.expert_width = kExpertWidth;
  layer.shared_width = kSharedWidth;
  config.layers = {layer};
  std::vector<int32_t> kept;
  std::vector<FusedPart> recipe = {{}};
  for (int32_t e = 0; e < kKept; ++e) {
    kept.push_back(e);
    recipe.push_back({.expert = e, .alpha = 0.07});
  }
  const LayerWeights parts = moe.Condensed(kept, std::vector<float>(kKept, 0.07f));
  FusedFeedForward storage;
  const LayerWeights fused = FusedLayer(moe, recipe, storage);
  std::vector<float> start(static_cast<size_t>(kTokens * kHidden));
  for (float& value : start) value = make.Unit();
  FeedForwardBlock block(config, pool, precision);
  AlignedBuffer<float> hidden(start.size()), of_parts(start.size());
  const auto run = [&](const LayerWeights& weights) {
    std::memcpy(hidden.data(), start.data(), hidden.size_bytes());
    return SecondsOf([&] { block.Run(weights, {}, kTokens, hidden.data()); }, threads == 1);
  };
  double routed = 1e30, apart = 1e30, whole = 1e30, library = 0;
  for (int round = 0; round < rounds; ++round) {
    library = std::max(library, LibraryRate(precision, threads, 2));
    routed = std::min(routed, run(moe));
    apart = std::min(apart, run(parts));
    std::memcpy(of_parts.data(), hidden.data(), hidden.size_bytes());
    whole = std::min(whole, run(fused));
  }
  double worst = 0;
  for (size_t i = 0; i < hidden.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(hidden[i] - of_parts[i])));
  }
  if (!(worst < 0.05)) {  // alpha is rounded to bf16 with each weight in the fused form
    std::printf("fused and parts differ by %g\n", worst);
    std::exit(1);
  }
  const double flop = 6.0 * static_cast<double>(kHidden * kFusedWidth * kTokens);
  const char* name = precision == ComputePrecision::kAuto ? "bf16" : "f32";
  std::printf("%-5s best library GEMM %7.1f GFLOP/s\n", name, library);
  std::printf(
      "%-5s condensed, fused   %7.1f GFLOP/s  %3.0f %% of it, %.2f of the MoE block's time\n", name,
      flop / whole * 1e-9, 100 * flop / whole * 1e-9 / library, whole / routed);
  std::printf("%-5s condensed, parts   %7.1f GFLOP/s  %3.0f %% of it\n", name, flop / apart * 1e-9,
              100 * flop / apart * 1e-9 / library);
  std::fflush(stdout);
}

void BenchDivergence(int64_t channels, int rounds) {
  constexpr int64_t kRows = 256;
  Weights make;
  std::vector<float> p(static_cast<size_t>(kRows * channels)), base, addition;
  for (float& value : p) value = 3 * make.Unit();
  base = p;
  for (size_t i = 0; i < base.size(); ++i) base[i] += 0.2f * make.Unit();
  for (size_t i = 0; i < base.size(); ++i) addition.push_back(make.Unit());
  Softmax(p.data(), kRows, channels, channels);
  const CandidateStream candidate{.base = base.data(), .addition = addition.data(), .scale = 0.07f};
  std::vector<float> scratch(static_cast<size_t>(channels));
  std::vector<double> got(kRows), want(kRows);
  JensenShannon(p.data(), candidate, kRows, channels, scratch.data(), got.data(), 1);
  JensenShannonReference(p.data(), candidate, kRows, channels, want.data(), 1);
  for (size_t t = 0; t < kRows; ++t) {
    if (!(std::abs(got[t] - want[t]) < 1e-4 * want[t])) {
      std::printf("divergence %g, reference %g\n", got[t], want[t]);
      std::exit(1);
    }
  }
  double best = 1e30;
  for (int round = 0; round < 10 * rounds; ++round) {
    best = std::min(best, SecondsOf(
                              [&] {
                                JensenShannon(p.data(), candidate, kRows, channels, scratch.data(),
                                              got.data(), 1);
                              },
                              true));
  }
  const double each = best / static_cast<double>(kRows * channels) * 1e9;
  std::printf("divergence, %5lld channels: %.3f ns a token, channel and candidate\n",
              static_cast<long long>(channels), each);
}

int Main(int argc, char** argv) {
  int threads = 1, rounds = 3;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with("--threads=")) threads = std::atoi(argv[i] + 10);
    if (argument.starts_with("--rounds=")) rounds = std::atoi(argv[i] + 9);
  }
  omp_set_num_threads(threads);
  openblas_set_num_threads(threads);
  std::printf("condense_bench: %s, %d thread(s), DeepSeekMoE-16B's shape, %lld tokens\n",
              ActiveIsa().c_str(), threads, static_cast<long long>(kTokens));
  for (const int64_t channels : {128, 2048}) BenchDivergence(channels, rounds);
  BenchBlock(ComputePrecision::kF32, threads, rounds);
  if (ActiveIsa() == "avx512_bf16") BenchBlock(ComputePrecision::kAuto, threads, rounds);
  return 0;
}

}  // namespace
}  // namespace winnow

int main(int argc, char** argv) {
  return winnow::RunBenchmark(winnow::Main, argc, argv);
}
