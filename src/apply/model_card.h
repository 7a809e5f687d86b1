// The card that goes with a pruned checkpoint: what was done, from what, and what was measured.
#pragma once

#include <string>

#include "apply/checkpoint_rewriter.h"  // RewritePlan
#include "checkpoint/checkpoint.h"      // Checkpoint
#include "plan/compression_plan.h"      // CompressionPlan

namespace winnow {

// README.md, or WINNOW.md if the source has a README.md of its own (which is carried through).
std::string CardFileName(const Checkpoint& source);
// `changes` says how weights that were kept were changed (empty: they were not); `measurements` is
// Markdown that follows the description and may be empty.
std::string ModelCard(const CompressionPlan& plan, const RewritePlan& rewrite,
                      const std::string& changes, const std::string& measurements);

}  // namespace winnow
