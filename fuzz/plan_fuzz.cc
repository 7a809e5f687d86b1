// plan.json as bytes: either refused with a ModelError, or a plan that survives writing.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "plan/compression_plan.h"
#include "plan/loader_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  try {
    const CompressionPlan plan = PlanFromJson(
        ParseJson(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz"), "fuzz");
    for (const LayerPlan& layer : plan.layers) {
      if (layer.layer < 0 || layer.num_experts < 0) std::abort();
      for (const int32_t expert : layer.kept) {
        if (expert < 0) std::abort();
      }
    }
    const std::string written = PlanToJson(plan).dump();
    const CompressionPlan again = PlanFromJson(ParseJson(written, "written"), "written");
    if (PlanToJson(again).dump() != written) std::abort();
    CheckTarget(plan, "llama.cpp");
  } catch (const ModelError&) {
  } catch (const UsageError&) {  // layers of different sizes
  }
  return 0;
}
