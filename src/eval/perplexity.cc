#include "eval/perplexity.h"

#include <fmt/format.h>

#include <cmath>

#include "base/error.h"

namespace winnow {
namespace {

std::vector<TokenTarget> TargetsOf(const ScoredWindows& windows) {
  std::vector<TokenTarget> targets;
  targets.reserve(static_cast<size_t>(windows.scored));
  for (size_t i = 0; i < windows.targets.size(); ++i) {
    if (windows.targets[i] >= 0) {
      targets.push_back({static_cast<int64_t>(i), windows.targets[i]});
    }
  }
  return targets;
}

}  // namespace

EvalPlan PlanPerplexity(const Model& model, const ScoredWindows& windows,
                        const EvalOptions& options, int num_threads) {
  const auto bookkeeping =
      static_cast<uint64_t>(windows.inputs.num_tokens()) * sizeof(int32_t) +
      static_cast<uint64_t>(windows.scored) * (sizeof(TokenTarget) + kTargetScoreBytes);
  return PlanEval(model, windows.inputs, bookkeeping, options, num_threads);
}

PerplexityResult RunPerplexity(const Model& model, const ScoredWindows& windows,
                               const EvalOptions& options, const EvalPlan& plan, ThreadPool& pool,
                               const JobControl& control) {
  RequireIdsInVocabulary(model, windows.targets);
  SweptStates swept = SweepLayers(model, windows.inputs, options, plan, pool, control);
  PerplexityResult result = ScoreStates(model, windows, *swept.states, pool, control);
  result.skipping = std::move(swept.skipping);
  return result;
}

PerplexityResult ScoreStates(const Model& model, const ScoredWindows& windows, HiddenStates& states,
                             ThreadPool& pool, const JobControl& control) {
  const std::vector<TokenTarget> targets = TargetsOf(windows);
  const std::vector<TokenScore> scores =
      ScoreTargets(model, windows.inputs, targets, states, pool, control);
  std::vector<double> window_nll;
  std::vector<int64_t> window_tokens;
  size_t next = 0;
  for (int64_t w = 0; w < windows.inputs.num_sequences(); ++w) {
    const int64_t begin = windows.inputs.offsets[static_cast<size_t>(w)];
    const int64_t end = windows.inputs.offsets[static_cast<size_t>(w) + 1];
    double sum = 0;
    int64_t tokens = 0;
    for (; next < targets.size() && targets[next].position < end; ++next) {
      const double score = scores[next].log_likelihood;
      if (!std::isfinite(score)) {
        throw ModelError(fmt::format("the model's logits are not finite (window {}, position {})",
                                     w, targets[next].position - begin),
                         "the weights may hold NaN or Inf: see winnow doctor MODEL");
      }
      sum -= score;
      ++tokens;
    }
    window_nll.push_back(sum);
    window_tokens.push_back(tokens);
  }
  return Summarize(window_nll, window_tokens, windows.bytes);
}

PerplexityResult Summarize(std::span<const double> window_nll,
                           std::span<const int64_t> window_tokens, uint64_t bytes) {
  PerplexityResult result;
  result.window_nll.assign(window_nll.begin(), window_nll.end());
  result.window_tokens.assign(window_tokens.begin(), window_tokens.end());
  double total = 0;
  for (size_t w = 0; w < window_nll.size(); ++w) {
    total += window_nll[w];
    result.tokens += window_tokens[w];
  }
  result.nll = total / static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.nll);
  if (bytes > 0) result.bits_per_byte = total / std::log(2.0) / static_cast<double>(bytes);
  const auto count = static_cast<double>(window_nll.size());
  if (window_nll.size() > 1) {
    double squares = 0;
    for (size_t w = 0; w < window_nll.size(); ++w) {
      const double mean = window_nll[w] / static_cast<double>(window_tokens[w]);
      squares += (mean - result.nll) * (mean - result.nll);
    }
    result.standard_error = std::sqrt(squares / (count - 1) / count);
  }
  return result;
}

PairedDifference Compare(const PerplexityResult& a, const PerplexityResult& b) {
  PairedDifference difference;
  difference.nll = b.nll - a.nll;
  const auto count = static_cast<double>(a.window_nll.size());
  if (a.window_nll.size() < 2) return difference;
  double squares = 0;
  for (size_t w = 0; w < a.window_nll.size(); ++w) {
    const double d = (b.window_nll[w] - a.window_nll[w]) / static_cast<double>(a.window_tokens[w]) -
                     difference.nll;
    squares += d * d;
  }
  difference.standard_error = std::sqrt(squares / (count - 1) / count);
  return difference;
}

}  // namespace winnow
