#include "condense/expert_search.h"

#include <algorithm>

#include "base/aligned_buffer.h"
#include "kernels/divergence.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

constexpr int64_t kRows = 64;  // a task

// Calls body(first, end, worker) for row ranges in parallel.
template <class Body>
void ForRows(ThreadPool& pool, int64_t first, int64_t count, const Body& body) {
  pool.Run((count + kRows - 1) / kRows, [&](int64_t task, int worker) {
    body(first + task * kRows, first + std::min(count, (task + 1) * kRows), worker);
  });
}

}  // namespace

double MeanOverDocuments(std::span<const double> values, int64_t stride,
                         std::span<const int64_t> offsets) {
  double total = 0;
  for (size_t n = 0; n + 1 < offsets.size(); ++n) {
    double sum = 0;
    for (int64_t t = offsets[n]; t < offsets[n + 1]; ++t) {
      sum += values[static_cast<size_t>(t * stride)];
    }
    total += sum / static_cast<double>(offsets[n + 1] - offsets[n]);
  }
  return total / static_cast<double>(offsets.size() - 1);
}

uint64_t ExpertSearchBytes(int64_t num_tokens, int64_t num_experts, int64_t hidden,
                           int num_threads) {
  return static_cast<uint64_t>(num_tokens) * static_cast<uint64_t>(num_experts) * sizeof(double) +
         static_cast<uint64_t>(num_threads) * static_cast<uint64_t>(hidden) * sizeof(float);
}

std::vector<GreedyStep> SearchExperts(const ExpertSearchInput& input, ThreadPool& pool,
                                      const JobControl& control) {
  const int64_t h = input.hidden, tokens = input.offsets.back();
  std::vector<int32_t> left(input.alphas.size());
  for (size_t e = 0; e < left.size(); ++e) left[e] = static_cast<int32_t>(e);
  std::vector<GreedyStep> steps;
  AlignedBuffer<double> divergence(static_cast<size_t>(tokens) * left.size());
  AlignedBuffer<float> scratch(static_cast<size_t>(pool.num_threads()) * static_cast<size_t>(h));
  while (std::ssize(steps) < input.max_experts && !left.empty()) {
    const int64_t candidates = std::ssize(left);
    for (int64_t begin = 0; begin < tokens; begin += kSearchChunkTokens) {
      const int64_t count = std::min(kSearchChunkTokens, tokens - begin);
      for (int64_t c = 0; c < candidates; ++c) {
        control.Poll();
        const int32_t expert = left[static_cast<size_t>(c)];
        const float* rows = input.outputs.Load(expert, begin, count);
        ForRows(pool, begin, count, [&](int64_t first, int64_t end, int worker) {
          JensenShannon(input.probabilities.data() + first * h,
                        {.base = input.base.data() + first * h,
                         .addition = rows + (first - begin) * h,
                         .scale = static_cast<float>(input.alphas[static_cast<size_t>(expert)]),
                         .norm_weight = input.norm_weight,
                         .norm_eps = input.norm_eps},
                        end - first, h, scratch.data() + worker * h,
                        divergence.data() + first * candidates + c, candidates);
        });
      }
    }
    GreedyStep step;
    size_t best = 0;
    for (int64_t c = 0; c < candidates; ++c) {
      step.candidates.push_back(MeanOverDocuments(
          std::span<const double>(divergence.span()).subspan(static_cast<size_t>(c)), candidates,
          input.offsets));
      if (step.candidates.back() < step.candidates[best]) best = static_cast<size_t>(c);
    }
    step.chosen = left[best];
    step.divergence = step.candidates[best];
    for (int64_t begin = 0; begin < tokens; begin += kSearchChunkTokens) {
      const int64_t count = std::min(kSearchChunkTokens, tokens - begin);
      const float* rows = input.outputs.Load(step.chosen, begin, count);
      const auto alpha = static_cast<float>(input.alphas[static_cast<size_t>(step.chosen)]);
      ForRows(pool, begin, count, [&](int64_t first, int64_t end, int) {
        AddScaled(input.base.data() + first * h, alpha, rows + (first - begin) * h,
                  (end - first) * h);
      });
    }
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(best));
    steps.push_back(std::move(step));
  }
  return steps;
}

}  // namespace winnow
