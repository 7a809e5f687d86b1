// A decoder layer at work: one to eight sequences of 512 tokens through attention, router and
// experts in the shapes of published models, and the same with all experts and statistics as
// `winnow observe --stats full` does it. Rates count every matrix product and are printed as shares
// of the best rate a library (OpenBLAS, oneDNN) reaches on the experts' shapes in the same run: in
// f32, and in bf16 on CPUs that multiply pairs of bf16. Beside them: what observing takes of the
// time of running all experts and gathering nothing; and what skipping experts (naee_skip.h) leaves
// of the experts' time, beside the share of experts that still run.
//
//   layer_bench [--threads=N] [--rounds=N] [--only=WORD]
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "base/file.h"
#include "base/progress.h"
#include "bench_main.h"
#include "forward/attention.h"
#include "forward/feed_forward.h"
#include "kernels/targets.h"
#include "machine_peak.h"
#include "observe/stats_collector.h"
#include "onednn_matmul.h"

namespace winnow {
namespace {

constexpr int64_t kSequenceTokens = 512;

struct Shape {
  const char* name;
  int64_t hidden, heads, kv_heads, head_dim, experts, per_token, width;
  int64_t sequences;  // as many as keep a run within seconds
  int64_t tokens() const { return sequences * kSequenceTokens; }
};

// A decoder layer of random bf16 weights.
class SyntheticLayer {
 public:
  explicit SyntheticLayer(const Shape& shape) {
    const int64_t h = shape.hidden, q = shape.heads * shape.head_dim,
                  kv = shape.kv_heads * shape.head_dim;
    weights.input_norm.assign(static_cast<size_t>(h), 1.0f);
    weights.post_attention_norm = weights.input_norm;
    weights.q = Matrix(q, h);
    weights.k = Matrix(kv, h);
    weights.v = Matrix(kv, h);
    weights.o = Matrix(h, q);
    weights.router = Matrix(shape.experts, h);
    for (int64_t e = 0; e < shape.experts; ++e) {
      weights.experts.push_back(
          {Matrix(shape.width, h), Matrix(shape.width, h), Matrix(h, shape.width)});
    }
    config.hidden_size = h;
    config.num_heads = shape.heads;
    config.num_kv_heads = shape.kv_heads;
    config.head_dim = shape.head_dim;
    config.num_experts_per_tok = shape.per_token;
    config.norm_topk_prob = true;
    LayerConfig layer;
    layer.is_moe = true;
    layer.num_experts = shape.experts;
    layer.expert_width = shape.width;
    config.layers = {layer};
  }
  ModelConfig config;
  LayerWeights weights;

 private:
  WeightMatrix Matrix(int64_t rows, int64_t cols) {
    AlignedBuffer<uint16_t>& data = storage_.emplace_back(static_cast<size_t>(rows * cols));
    const float scale = 1.0f / std::sqrt(static_cast<float>(cols));
    for (uint16_t& value : data.span()) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      const auto unit = static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
      value = Bf16FromFloat(unit * 1.7f * scale);
    }
    return {reinterpret_cast<const std::byte*>(data.data()), rows, cols, Dtype::kBF16};
  }
  std::vector<AlignedBuffer<uint16_t>> storage_;
  uint64_t state_ = 42;
};

double LayerFlop(const Shape& s, bool all_experts) {
  const auto h = static_cast<double>(s.hidden);
  double per_token =
      2 * h * static_cast<double>(2 * s.heads * s.head_dim + 2 * s.kv_heads * s.head_dim);
  // Causal scores and values: half of the square.
  per_token += 2.0 * static_cast<double>(s.heads * s.head_dim * kSequenceTokens);
  per_token += 2 * h * static_cast<double>(s.experts);
  const auto used = static_cast<double>(all_experts ? s.experts : s.per_token);
  per_token += 6 * h * static_cast<double>(s.width) * used;
  if (all_experts) per_token += h * static_cast<double>(s.experts * (s.experts + 1));
  return per_token * static_cast<double>(s.tokens());
}

// Best GFLOP/s of two libraries on one expert's three products, 512 rows each.
double LibraryRate(const Shape& s, ComputePrecision precision, int threads, int rounds) {
  const int64_t rows = 512;
  double best = 0;
  for (const auto& shape : {std::pair{s.width, s.hidden}, {s.hidden, s.width}}) {
    const int64_t n = shape.first, k = shape.second;
    std::vector<float> x(static_cast<size_t>(rows * k), 0.5f), w(static_cast<size_t>(n * k), 0.25f),
        y(static_cast<size_t>(rows * n));
    const double flop =
        2.0 * static_cast<double>(rows) * static_cast<double>(n) * static_cast<double>(k);
    if (precision == ComputePrecision::kAuto) {
      OneDnnMatMul matmul(dnnl::memory::data_type::bf16, x.data(), w.data(), y.data(), rows, n, k);
      for (int round = 0; round < rounds; ++round) {
        best = std::max(best, flop / SecondsOf([&] { matmul.Run(); }, threads == 1) * 1e-9);
      }
      continue;
    }
    OneDnnMatMul matmul(dnnl::memory::data_type::f32, x.data(), w.data(), y.data(), rows, n, k);
    for (int round = 0; round < rounds; ++round) {
      const double blas = SecondsOf(
          [&] {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows),
                        static_cast<int>(n), static_cast<int>(k), 1.0f, x.data(),
                        static_cast<int>(k), w.data(), static_cast<int>(k), 0.0f, y.data(),
                        static_cast<int>(n));
          },
          threads == 1);
      const double dnnl = SecondsOf(
          [&] {
            dnnl_sgemm('N', 'T', rows, n, k, 1.0f, x.data(), k, w.data(), k, 0.0f, y.data(), n);
          },
          threads == 1);
      const double primitive = SecondsOf([&] { matmul.Run(); }, threads == 1);
      best = std::max({best, flop / blas * 1e-9, flop / dnnl * 1e-9, flop / primitive * 1e-9});
    }
  }
  return best;
}

// Makes all experts run and looks at nothing.
class AllExperts : public MoeObserver {
 public:
  bool WantsExpertOutputs() const override { return true; }
  void OnTokens(const MoeTokens&) override {}
};

// Seconds of the feed-forward block alone, without and with experts below `beta` of the best
// skipped, and the share of experts that run.
struct Skipping {
  double all = 1e30, some = 1e30, experts = 0;
};
Skipping MeasureSkipping(const SyntheticLayer& layer, int64_t tokens, const float* start,
                         double beta, ComputePrecision precision, ThreadPool& pool, int threads,
                         int rounds) {
  const auto size = static_cast<size_t>(tokens * layer.config.hidden_size);
  AlignedBuffer<float> hidden(size);
  Skipping result;
  for (int round = 0; round < rounds; ++round) {
    for (const bool skips : {false, true}) {
      FeedForwardBlock feed_forward(layer.config, pool, precision);
      if (skips) feed_forward.SetSkipping({beta});
      std::memcpy(hidden.data(), start, hidden.size_bytes());
      const double seconds = SecondsOf(
          [&] { feed_forward.Run(layer.weights, {}, tokens, hidden.data()); }, threads == 1);
      double& best = skips ? result.some : result.all;
      best = std::min(best, seconds);
      if (!skips) continue;
      result.experts = static_cast<double>(feed_forward.skip_counts().experts[0]) /
                       static_cast<double>(tokens * layer.config.num_experts_per_tok);
    }
  }
  return result;
}

void Bench(const Shape& shape, ComputePrecision precision, int threads, int rounds) {
  ThreadPool pool(threads);
  SyntheticLayer layer(shape);
  AttentionBlock attention(layer.config, pool, precision);
  FeedForwardBlock feed_forward(layer.config, pool, precision);
  const int64_t tokens = shape.tokens();
  const auto size = static_cast<size_t>(tokens * shape.hidden);
  AlignedBuffer<float> start(size), hidden(size);
  uint64_t state = 7;
  for (float& value : start.span()) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-31f;
  }
  const std::vector<int64_t> lengths(static_cast<size_t>(shape.sequences), kSequenceTokens);
  StatsInfo info;
  info.hidden_size = shape.hidden;
  info.num_layers = 1;
  info.num_experts_per_tok = shape.per_token;
  info.norm_topk_prob = true;
  info.sources = {{"bench", "", shape.sequences, tokens, {{kSequenceTokens, shape.sequences}}}};
  info.layers = {{0, shape.experts, 0}};
  const fs::path folder = fs::temp_directory_path() / "winnow-layer-bench";
  fs::create_directories(folder);
  double best_layer = 1e30, best_observe = 1e30, best_all = 1e30, library = 0;
  for (int round = 0; round < rounds; ++round) {
    library = std::max(library, LibraryRate(shape, precision, threads, 2));
    std::memcpy(hidden.data(), start.data(), start.size_bytes());
    best_layer =
        std::min(best_layer, SecondsOf(
                                 [&] {
                                   attention.Run(layer.weights, lengths, hidden.data());
                                   feed_forward.Run(layer.weights, {}, tokens, hidden.data());
                                 },
                                 threads == 1));
    AllExperts all_experts;
    std::memcpy(hidden.data(), start.data(), start.size_bytes());
    best_all = std::min(best_all, SecondsOf(
                                      [&] {
                                        attention.Run(layer.weights, lengths, hidden.data());
                                        feed_forward.Run(layer.weights, {.observer = &all_experts},
                                                         tokens, hidden.data());
                                      },
                                      threads == 1));
    std::memcpy(hidden.data(), start.data(), start.size_bytes());
    best_observe =
        std::min(best_observe, SecondsOf(
                                   [&] {
                                     LayerStatsWriter writer(folder, info, info.layers[0]);
                                     StatsCollector collector(info, info.layers[0], writer, pool);
                                     attention.Run(layer.weights, lengths, hidden.data());
                                     feed_forward.Run(layer.weights, {.observer = &collector},
                                                      tokens, hidden.data());
                                     collector.Finish();
                                   },
                                   threads == 1));
  }
  for (const float value : hidden.span()) {
    if (!std::isfinite(value)) {
      std::printf("%s: the layer's output is not finite\n", shape.name);
      std::exit(1);
    }
  }
  fs::remove_all(folder);
  const double layer_rate = LayerFlop(shape, false) / best_layer * 1e-9;
  const double observe_rate = LayerFlop(shape, true) / best_observe * 1e-9;
  std::printf("%-14s best library GEMM %7.1f GFLOP/s, %s, %lld tokens\n", shape.name, library,
              precision == ComputePrecision::kAuto ? "bf16" : "f32",
              static_cast<long long>(tokens));
  std::printf("%-14s layer             %7.1f GFLOP/s  %3.0f %% of it\n", "", layer_rate,
              100 * layer_rate / library);
  std::printf("%-14s observe full      %7.1f GFLOP/s  %3.0f %% of it\n", "", observe_rate,
              100 * observe_rate / library);
  std::printf("%-14s observing takes   %7.2f of running all experts\n", "",
              best_observe / best_all);
  for (const double beta : {0.3, 0.45, 0.6}) {
    const Skipping skipping =
        MeasureSkipping(layer, tokens, start.data(), beta, precision, pool, threads, rounds);
    std::printf("%-14s skipping: experts run %.3f, experts' time %.3f (%.3f s -> %.3f s)\n", "",
                skipping.experts, skipping.some / skipping.all, skipping.all, skipping.some);
  }
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  int threads = 1, rounds = 3;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with("--threads=")) threads = std::atoi(argv[i] + 10);
    if (argument.starts_with("--rounds=")) rounds = std::atoi(argv[i] + 9);
    if (argument.starts_with("--only=")) only = argv[i] + 7;
  }
  omp_set_num_threads(threads);
  openblas_set_num_threads(threads);
  std::printf("layer_bench: %s, %d thread(s), bf16 weights\n", ActiveIsa().c_str(), threads);
  const Shape shapes[] = {
      {"olmoe-1b-7b", 2048, 16, 16, 128, 64, 8, 1024, 2},
      {"mixtral-8x7b", 4096, 32, 8, 128, 8, 2, 14336, 1},
      {"qwen3-30b-a3b", 2048, 32, 4, 128, 128, 8, 768, 2},
      {"sample", 128, 4, 2, 32, 8, 2, 256, 8},
  };
  for (const Shape& shape : shapes) {
    if (std::string_view(shape.name).find(only) == std::string_view::npos) continue;
    Bench(shape, ComputePrecision::kF32, threads, rounds);
    if (ActiveIsa() == "avx512_bf16") Bench(shape, ComputePrecision::kAuto, threads, rounds);
  }
  return 0;
}

}  // namespace
}  // namespace winnow

int main(int argc, char** argv) {
  return winnow::RunBenchmark(winnow::Main, argc, argv);
}
