#include "plan/loader_target.h"

#include <fmt/format.h>

#include <array>
#include <string_view>

#include "base/error.h"

namespace winnow {
namespace {

struct LoaderTarget {
  std::string_view name;
  int64_t max_experts;        // 0: no limit known
  std::string_view families;  // space-separated model types it loads; empty: all of ours
  std::string_view reason;
};

// Every one of them takes a single expert count for all layers.
constexpr std::array kTargets = {
    LoaderTarget{"transformers", 0, "", ""},
    LoaderTarget{"vllm", 0, "", ""},
    LoaderTarget{"llama.cpp", 512, "mixtral qwen2_moe qwen3_moe olmoe deepseek",
                 "its table of experts has 512 places"},
};

}  // namespace

std::vector<std::string> LoaderTargets() {
  std::vector<std::string> names;
  for (const LoaderTarget& target : kTargets) names.emplace_back(target.name);
  return names;
}

void CheckTarget(const CompressionPlan& plan, const std::string& name) {
  for (const LoaderTarget& target : kTargets) {
    if (target.name != name) continue;
    for (const LayerPlan& layer : plan.layers) {
      if (layer.kept.size() != plan.layers.front().kept.size()) {
        throw UsageError(
            fmt::format("{} needs the same number of experts in every layer; the plan has "
                        "{} in layer {} and {} in layer {}",
                        name, plan.layers.front().kept.size(), plan.layers.front().layer,
                        layer.kept.size(), layer.layer));
      }
      if (target.max_experts > 0 && static_cast<int64_t>(layer.kept.size()) > target.max_experts) {
        throw UsageError(
            fmt::format("{} does not load {} experts: {}", name, layer.kept.size(), target.reason));
      }
    }
    return;
  }
  throw UsageError(fmt::format("--target: \"{}\" is not known", name),
                   "use transformers, vllm or llama.cpp");
}

}  // namespace winnow
