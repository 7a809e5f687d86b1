#include "observe_rounds.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/units.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "observe/stats_merge.h"
#include "planning.h"
#include "pruning.h"

namespace winnow::cli {
namespace {

// Parts of the text: each round but the first is as large as all before it.
constexpr std::array kRoundEnds = {8, 4, 2, 1};  // 1/8, 1/4, 1/2 and all of it

// Sequences [begin, end) of a text.
SourceBlocks Slice(const SourceBlocks& source, int64_t begin, int64_t end) {
  const TokenSequences& all = source.sequences;
  const auto first = all.offsets[static_cast<size_t>(begin)];
  const auto last = all.offsets[static_cast<size_t>(end)];
  SourceBlocks slice{source.name, {}};
  slice.sequences.ids.assign(all.ids.begin() + first, all.ids.begin() + last);
  if (!all.weights.empty()) {
    slice.sequences.weights.assign(all.weights.begin() + first, all.weights.begin() + last);
  }
  for (int64_t i = begin; i <= end; ++i) {
    slice.sequences.offsets.push_back(all.offsets[static_cast<size_t>(i)] - first);
  }
  return slice;
}

std::vector<SourceBlocks> RoundOf(const std::vector<SourceBlocks>& sources, size_t round) {
  std::vector<SourceBlocks> slices;
  for (const SourceBlocks& source : sources) {
    const int64_t n = source.sequences.size();
    const int64_t begin = round == 0 ? 0 : n / kRoundEnds[round - 1];
    const int64_t end = n / kRoundEnds[round];
    if (end > begin) slices.push_back(Slice(source, begin, end));
  }
  return slices;
}

bool IsOfRounds(const std::string& name) {
  return name == "merged" || name == "merged.partial" || IsNumbered(name, "round-");
}

// If one text has a mask, all have: the rounds must be alike to be joined.
std::vector<SourceBlocks> WithWeights(std::vector<SourceBlocks> sources) {
  const bool any = std::any_of(sources.begin(), sources.end(), [](const SourceBlocks& source) {
    return !source.sequences.weights.empty();
  });
  for (SourceBlocks& source : sources) {
    if (any && source.sequences.weights.empty()) {
      source.sequences.weights.assign(source.sequences.ids.size(), 1.0f);
    }
  }
  return sources;
}

double WeightOf(const std::vector<SourceBlocks>& sources) {
  double weight = 0;
  for (const SourceBlocks& source : sources) {
    const std::vector<float>& weights = source.sequences.weights;
    weight += weights.empty() ? static_cast<double>(source.sequences.ids.size()) : 0.0;
    for (const float w : weights) weight += static_cast<double>(w);
  }
  return weight;
}

}  // namespace

ObservedRounds ObserveUntilStable(Session& session, const Model& model,
                                  const std::vector<SourceBlocks>& sources,
                                  const ObserveOptions& options, int64_t keep,
                                  const std::string& output) {
  const fs::path folder = output + ".rounds";
  ClaimWorkFolder(folder, session.flags, IsOfRounds);
  // What could go wrong in the last round is found out before the first.
  const std::vector<SourceBlocks> weighed = WithWeights(sources);
  ObserveOptions whole_options = options;
  whole_options.memory_budget_bytes = session.memory_budget();
  const ObservePlan whole =
      PlanObserve(model, weighed, whole_options, session.pool().num_threads());
  NaeeOptions naee{.keep = keep};
  CheckNaee(whole.info, naee);
  naee.memory_budget_bytes = RequirePlanMemory(session, whole.info, naee);
  RequireDiskSpace(output, 2 * whole.stats_bytes, "the rounds and what joins them");
  std::vector<std::vector<SourceBlocks>> rounds;
  std::vector<StatsInfo> planned;
  for (size_t round = 0; round < kRoundEnds.size(); ++round) {
    std::vector<SourceBlocks> slices = RoundOf(weighed, round);
    if (slices.empty()) continue;  // fewer blocks than parts
    planned.push_back(PlanObserve(model, slices, whole_options, session.pool().num_threads()).info);
    rounds.push_back(std::move(slices));
  }
  MergedInfo(planned);
  if (!session.flags.resume) fs::remove_all(folder);
  double weight = 0;
  ObservedRounds result;
  std::vector<fs::path> parts;
  std::vector<std::vector<int32_t>> before;
  const fs::path merged = folder / "merged";
  for (size_t round = 0; round < rounds.size() && !result.stable; ++round) {
    const std::vector<SourceBlocks>& slices = rounds[round];
    const fs::path part = folder / fmt::format("round-{}", round + 1);
    ObserveOptions round_options = options;
    const ObservePlan plan = PrepareObserve(session, model, slices, round_options, part.string());
    uint64_t bytes_read = 0;
    if (!HasFinishedStats(session, part, plan.info)) {
      fs::create_directories(folder);
      bytes_read =
          RunObserve(model, slices, round_options, plan, part, session.pool(), session.control())
              .bytes_read;
    }
    result.weight_bytes_read += bytes_read;
    parts.push_back(part);
    fs::remove_all(merged);
    MergeStats(parts, merged, session.control());
    result.info = ReadStatsInfo(merged);
    weight += WeightOf(slices);
    if (weight == 0) {
      session.Note(fmt::format("round {}: no token of it counts yet", round + 1));
      continue;
    }
    std::vector<std::vector<int32_t>> kept;
    std::vector<int32_t> changed;
    for (const StatsLayer& layer : result.info.layers) {
      const LayerStatsReader records(merged, result.info, layer);
      kept.push_back(
          ChooseNaee(records, result.info, layer, naee, session.pool(), session.control()).kept);
      if (kept.size() > before.size() || kept.back() != before[kept.size() - 1]) {
        changed.push_back(layer.layer);
      }
    }
    result.stable = !before.empty() && changed.empty();
    session.Note(fmt::format(
        "round {}: {} tokens so far, {} of weights read; {}", round + 1,
        FormatCount(static_cast<uint64_t>(result.info.num_tokens())), FormatBytes(bytes_read),
        before.empty()    ? "a first choice"
        : changed.empty() ? "the same choice in every layer"
                          : fmt::format("another choice in layers {}", fmt::join(changed, " "))));
    result.rounds.push_back(
        {{"tokens", result.info.num_tokens()},
         {"weight_bytes_read", bytes_read},
         {"changed_layers", before.empty() ? OrderedJson() : OrderedJson(changed)}});
    before = std::move(kept);
  }
  if (result.rounds.size() < 2) {
    session.Warn("too little text for two rounds: nothing was compared; give more (--blocks)");
  } else if (!result.stable) {
    session.Warn(
        "the choice still changes with more text: give more (--blocks), or take it as it is");
  }
  fs::remove_all(output);
  RenameDurably(merged, output);
  fs::remove_all(folder);
  return result;
}

}  // namespace winnow::cli
