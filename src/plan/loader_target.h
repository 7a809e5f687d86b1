// Which programs can load a pruned checkpoint: rules of each loader, as data with a reason.
#pragma once

#include <cstdint>
#include <string>

#include "plan/compression_plan.h"  // CompressionPlan

namespace winnow {

// Known targets: "transformers" (default), "vllm", "llama.cpp", all of which load every family here
// with one number of experts for all layers; and "winnow", which takes any.
// UsageError if no such target is known.
void CheckTargetName(const std::string& name);
// UsageError if `target` is unknown or could not load what the plan describes.
void CheckTarget(const CompressionPlan& plan, const std::string& target);

}  // namespace winnow
