#include "model/family.h"

#include <array>

#include "model/families/families.h"

namespace winnow {
namespace {

constexpr std::array<const Family*, 5> kFamilies = {&families::kMixtral, &families::kQwen2Moe,
                                                    &families::kQwen3Moe, &families::kOlmoe,
                                                    &families::kDeepseek};

}  // namespace

std::span<const Family* const> AllFamilies() {
  return kFamilies;
}

const Family* FindFamily(std::string_view model_type) {
  for (const Family* family : kFamilies) {
    if (family->model_type == model_type) return family;
  }
  return nullptr;
}

}  // namespace winnow
