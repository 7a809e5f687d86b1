// observe --until-stable: rounds over more and more text, each one sweep over new blocks, until the
// experts that NAEE would keep no longer change.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"          // Model
#include "observe/observe_run.h"  // ObserveOptions
#include "session.h"              // Session
#include "text/block_builder.h"   // SourceBlocks

namespace winnow::cli {

struct ObservedRounds {
  StatsInfo info;  // of what was merged
  uint64_t weight_bytes_read = 0;
  bool stable = false;
  OrderedJson rounds = OrderedJson::array();
};

// Observes an eighth of the blocks (of each text), then as many again, and so on; merges the rounds
// and plans `keep` survivors after each. Writes the merged statistics to `output`. What is not
// merged yet lies in OUT.rounds, from where --resume goes on.
ObservedRounds ObserveUntilStable(Session& session, const Model& model,
                                  const std::vector<SourceBlocks>& sources,
                                  const ObserveOptions& options, int64_t keep,
                                  const std::string& output);

}  // namespace winnow::cli
