// `winnow stats merge A B -o C`: what one run over both texts would have gathered. Sources keep
// their own sums and batches never straddle sources, so merging is joining: records are
// concatenated, sums are carried over bit for bit.
#pragma once

#include <cstdint>
#include <vector>

#include "base/file.h"           // fs
#include "base/progress.h"       // JobControl
#include "observe/stats_info.h"  // StatsInfo

namespace winnow {

// Merging holds this buffer and the lists of tensors and sequences of every part.
inline constexpr uint64_t kMergeBufferBytes = uint64_t{8} << 20;
uint64_t MergeListBytes(const std::vector<StatsInfo>& parts);

// UsageError if the folders are of different models, levels, compute modes or batches, hold the
// same text twice, or were gathered progressively (their layers depend on the text through earlier
// choices).
StatsInfo MergedInfo(const std::vector<StatsInfo>& parts);
void MergeStats(const std::vector<fs::path>& parts, const fs::path& output,
                const JobControl& control);

}  // namespace winnow
