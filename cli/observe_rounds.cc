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

bool IsRoundsFolder(const fs::path& folder) {
  if (!fs::is_directory(folder)) return false;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("round-") && !name.starts_with("merged")) return false;
  }
  return true;
}

}  // namespace

ObservedRounds ObserveUntilStable(Session& session, const Model& model,
                                  const std::vector<SourceBlocks>& sources,
                                  const ObserveOptions& options, int64_t keep,
                                  const std::string& output) {
  const fs::path folder = output + ".rounds";
  if (fs::exists(folder)) {
    if (session.flags.force && !IsRoundsFolder(folder)) {
      throw UsageError(
          fmt::format("{} was not written by winnow, so --force leaves it alone", folder.string()),
          "choose another name with -o, or remove it yourself");
    }
    if (session.flags.force) fs::remove_all(folder);
    if (!session.flags.resume && !session.flags.force) {
      throw UsageError(fmt::format("{} is left from an interrupted run", folder.string()),
                       "go on with --resume, or start again with --force");
    }
  }
  ObservedRounds result;
  std::vector<fs::path> parts;
  std::vector<std::vector<int32_t>> before;
  const fs::path merged = folder / "merged";
  for (size_t round = 0; round < kRoundEnds.size() && !result.stable; ++round) {
    const std::vector<SourceBlocks> slices = RoundOf(sources, round);
    if (slices.empty()) continue;  // fewer blocks than parts
    const fs::path part = folder / fmt::format("round-{}", round + 1);
    ObserveOptions round_options = options;
    const ObservePlan plan = PrepareObserve(session, model, slices, round_options, part.string());
    CheckNaee(plan.info, {.keep = keep});
    uint64_t bytes_read = 0;
    if (!session.flags.resume || !fs::exists(part / "stats.json")) {
      fs::create_directories(folder);
      bytes_read =
          RunObserve(model, slices, round_options, plan, part, session.pool(), session.control())
              .bytes_read;
    } else if (StatsInfoToJson(ReadStatsInfo(part)) != StatsInfoToJson(plan.info)) {
      throw UsageError(fmt::format("{} was made with another model, text or flag", part.string()),
                       "repeat the command as it was, or start again with --force");
    }
    result.weight_bytes_read += bytes_read;
    parts.push_back(part);
    fs::remove_all(merged);
    MergeStats(parts, merged, session.control());
    result.info = ReadStatsInfo(merged);
    std::vector<std::vector<int32_t>> kept;
    std::vector<int32_t> changed;
    for (const StatsLayer& layer : result.info.layers) {
      const LayerStatsReader records(merged, result.info, layer);
      kept.push_back(ChooseNaee(records, result.info, layer,
                                {.keep = keep, .memory_budget_bytes = session.memory_budget() / 2},
                                session.pool(), session.control())
                         .kept);
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
  if (!result.stable) {
    session.Warn(
        "the choice still changes with more text: give more (--blocks), or take it as it is");
  }
  fs::remove_all(output);
  RenameDurably(merged, output);
  fs::remove_all(folder);
  return result;
}

}  // namespace winnow::cli
