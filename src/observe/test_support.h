// For tests: observing runs over token sets.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "forward/test_support.h"  // TokenSet, GoldenFolder
#include "observe/layer_stats.h"   // LayerStatsReader
#include "observe/observe_run.h"   // RunObserve

namespace winnow {

inline constexpr uint64_t kAmpleBytes = uint64_t{1} << 40;

inline SourceBlocks SourceOf(std::string name, const TokenSet& tokens) {
  return {std::move(name), {tokens.ids, tokens.offsets}};
}

inline ObserveResult Observe(const Model& model, const std::vector<SourceBlocks>& sources,
                             ObserveOptions options, const fs::path& output, int threads = 1,
                             const JobControl& control = {}) {
  if (options.memory_budget_bytes == 0) options.memory_budget_bytes = kAmpleBytes;
  ThreadPool pool(threads);
  const ObservePlan plan = PlanObserve(model, sources, options, threads);
  return RunObserve(model, sources, options, plan, output, pool, control);
}

}  // namespace winnow
