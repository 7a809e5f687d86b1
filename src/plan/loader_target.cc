#include "plan/loader_target.h"

#include <fmt/format.h>

#include <array>
#include <string_view>

#include "base/error.h"

namespace winnow {
namespace {

struct LoaderTarget {
  std::string_view name;
  bool uneven;          // different numbers of experts in different layers
  int64_t max_experts;  // 0: no limit known
  std::string_view reason;
};

constexpr std::array kTargets = {
    LoaderTarget{"transformers", false, 0, ""},
    LoaderTarget{"vllm", false, 0, ""},
    LoaderTarget{"llama.cpp", false, 512, "its table of experts has 512 places"},
    LoaderTarget{"winnow", true, 0, ""},
};

const LoaderTarget& FindTarget(const std::string& name) {
  for (const LoaderTarget& target : kTargets) {
    if (target.name == name) return target;
  }
  throw UsageError(fmt::format("--target: \"{}\" is not known", name),
                   "use transformers, vllm, llama.cpp or winnow");
}

}  // namespace

void CheckTargetName(const std::string& name) {
  FindTarget(name);
}

void CheckTarget(const CompressionPlan& plan, const std::string& name) {
  const LoaderTarget& target = FindTarget(name);
  for (const LayerPlan& layer : plan.layers) {
    if (layer.condensed) {
      if (target.uneven) continue;
      throw UsageError(fmt::format("{} does not load condensed layers as they are (layer {})", name,
                                   layer.layer),
                       "plan for --target winnow; apply --stock writes a form it loads where the "
                       "family has one, --export-code brings code for transformers");
    }
    if (!target.uneven && layer.kept.size() != plan.layers.front().kept.size()) {
      throw UsageError(
          fmt::format("{} needs the same number of experts in every layer; the plan has "
                      "{} in layer {} and {} in layer {}",
                      name, plan.layers.front().kept.size(), plan.layers.front().layer,
                      layer.kept.size(), layer.layer),
          "keep the same in each, or plan for --target winnow alone");
    }
    if (target.max_experts > 0 && static_cast<int64_t>(layer.kept.size()) > target.max_experts) {
      throw UsageError(
          fmt::format("{} does not load {} experts: {}", name, layer.kept.size(), target.reason));
    }
  }
}

}  // namespace winnow
