// Which programs can load a pruned checkpoint: rules of each loader, as data with a reason.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/compression_plan.h"  // CompressionPlan

namespace winnow {

// "transformers" (default), "vllm", "llama.cpp".
std::vector<std::string> LoaderTargets();
// UsageError if `target` is unknown or could not load what the plan describes.
void CheckTarget(const CompressionPlan& plan, const std::string& target);

}  // namespace winnow
