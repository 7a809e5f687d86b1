// What a model could become within --size, predicted: for several numbers of experts' worth left,
// which experts go and which layers are condensed (mixing.h), what that costs, and what the bits
// cost that then fit the size. sizing.h makes the best of them and measures.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/packed_format.h"      // PackedFormat
#include "observe/stats_info.h"      // StatsInfo
#include "plan/compression_plan.h"   // CompressionPlan
#include "quantize/expert_errors.h"  // LayerErrors
#include "session.h"                 // Session
#include "text/block_builder.h"      // SourceBlocks

namespace winnow::cli {

// What may be tried (--means).
struct Means {
  bool drop = true, condense = true, bits = true;

  bool removes() const { return drop || condense; }
};
// "drop,bits"; all of them if empty. UsageError for anything else.
Means ParseMeans(const std::string& text);
std::string DescribeMeans(const Means& means);

struct SizeRequest {
  Means means;
  uint64_t bytes = 0;          // of all weight files
  PackedFormat experts, rest;  // grid and group of the experts; empty rest: as stored
  bool heals = true;           // what is removed will be healed
  fs::path stats, neurons;     // statistics, where the means need them
  fs::path spill_folder;
};

struct SizeCandidate {
  int64_t experts_left = 0;  // experts' worth, over all layers
  CompressionPlan plan;      // of what goes; nothing does if all experts are left
  // Effects on the logits (or errors of the stream, without neurons to weigh layers by); of bits as
  // if they were rounded plainly and nothing made up for it.
  double removal_cost = 0, bits_cost = 0;

  // `rounding_share`: what is left of the cost of bits once they are rounded with compensation.
  double predicted(double rounding_share) const {
    return removal_cost + rounding_share * bits_cost;
  }
  int64_t condensed_layers() const;
};

// Bits alone first, if they fit: the size shows then what share of the cost of bits is left.
// Without bits sorted. QualityError if nothing fits.
std::vector<SizeCandidate> PredictCandidates(Session& session, const Model& model,
                                             const StatsInfo& info, const SizeRequest& request,
                                             const std::vector<SourceBlocks>& fitting);
void SortByCost(std::span<SizeCandidate> candidates, double rounding_share);

}  // namespace winnow::cli
