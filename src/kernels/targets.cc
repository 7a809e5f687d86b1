#include "kernels/targets.h"

#include <algorithm>
#include <atomic>

#include "base/error.h"          // UsageError
#include "kernels/bf16_tile.h"   // CpuHasBf16Dots
#include "kernels/tile_shape.h"  // TileShape

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/targets.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

int64_t CompiledTarget() {
  return HWY_TARGET;
}
TileShape CompiledTileShape() {
  return {kTileRows, kTileColumns};
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(CompiledTarget);
HWY_EXPORT(CompiledTileShape);

TileShape ActiveTileShape() {
  return HWY_DYNAMIC_DISPATCH(CompiledTileShape)();
}

namespace {

// "avx512_bf16" is AVX-512 with one more kernel, which Highway has no target for. Set with the
// target by SelectIsa, before any kernel runs, and like Highway's own choice one for the process.
std::atomic<bool> bf16_dots_wanted{true};

constexpr const char* kBf16Name = "avx512_bf16";

// Highway's names stay inside: users see the instruction set that matters for speed.
std::string NameOfTarget(int64_t target) {
  if (target <= HWY_AVX3) return "avx512";
  if (target == HWY_AVX2) return "avx2";
  return "scalar";
}

// What the kernels were compiled for and this CPU and system can run, best first.
std::vector<int64_t> RunnableTargets() {
  std::vector<int64_t> targets;
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    targets.push_back(left & -left);
  }
  // The baseline is compiled in always, whether or not Highway counts it as supported.
  if (targets.empty() || targets.back() != HWY_STATIC_TARGET) targets.push_back(HWY_STATIC_TARGET);
  return targets;
}

}  // namespace

bool Bf16DotsSelected() {
  return bf16_dots_wanted.load() && HWY_DYNAMIC_DISPATCH(CompiledTarget)() <= HWY_AVX3 &&
         CpuHasBf16Dots();
}

std::vector<std::string> SupportedIsas() {
  std::vector<std::string> names;
  for (const int64_t target : RunnableTargets()) {
    const std::string name = NameOfTarget(target);
    if (names.empty() || names.front() != name) names.insert(names.begin(), name);
  }
  if (names.back() == "avx512" && CpuHasBf16Dots()) names.emplace_back(kBf16Name);
  return names;
}

std::string ActiveIsa() {
  return Bf16DotsSelected() ? kBf16Name : NameOfTarget(HWY_DYNAMIC_DISPATCH(CompiledTarget)());
}

void SelectIsa(std::string_view name) {
  const std::vector<std::string> supported = SupportedIsas();
  const bool with_dots = name == kBf16Name;
  if (std::find(supported.begin(), supported.end(), name) != supported.end()) {
    for (const int64_t target : RunnableTargets()) {
      if (NameOfTarget(target) != (with_dots ? "avx512" : name)) continue;
      bf16_dots_wanted.store(with_dots);
      hwy::GetChosenTarget().Update(target);
      return;
    }
  }
  std::string known;
  for (const std::string& isa : supported) known += (known.empty() ? "" : ", ") + isa;
  throw UsageError("instruction set '" + std::string(name) + "' cannot run on this CPU",
                   "choose one of: " + known);
}

}  // namespace winnow
#endif  // HWY_ONCE
