#include "plan/loader_target.h"

#include <fmt/format.h>

#include <array>
#include <string_view>

#include "base/error.h"

namespace winnow {
namespace {

struct LoaderTarget {
  std::string_view name;
  int64_t max_experts;  // 0: no limit known
  std::string_view reason;
};

// Every one of them takes a single expert count for all layers.
constexpr std::array kTargets = {
    LoaderTarget{"transformers", 0, ""},
    LoaderTarget{"vllm", 0, ""},
    LoaderTarget{"llama.cpp", 512, "its table of experts has 512 places"},
};

const LoaderTarget& FindTarget(const std::string& name) {
  for (const LoaderTarget& target : kTargets) {
    if (target.name == name) return target;
  }
  throw UsageError(fmt::format("--target: \"{}\" is not known", name),
                   "use transformers, vllm or llama.cpp");
}

}  // namespace

void CheckTargetName(const std::string& name) {
  FindTarget(name);
}

void CheckTarget(const CompressionPlan& plan, const std::string& name) {
  const LoaderTarget& target = FindTarget(name);
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
}

}  // namespace winnow
