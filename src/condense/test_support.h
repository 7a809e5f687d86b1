// For tests: what the published CD-MoE programs computed (tests/data/cd-moe).
#pragma once

#include <string>
#include <vector>

#include "condense/condense_run.h"  // RunCondense
#include "forward/test_support.h"   // GoldenFolder, TokenSet

namespace winnow {

inline fs::path CdMoeFolder() {
  return fs::path(WINNOW_TEST_DATA) / "cd-moe";
}
inline Json CdMoeReference() {
  const fs::path path = CdMoeFolder() / "cd-moe.json";
  return ParseJson(ReadTextFile(path), path.string());
}
inline Model CdMoeModel() {
  return Model::Open(CdMoeFolder() / "tiny");
}
// "search" or "alpha".
inline std::vector<SourceBlocks> CdMoeText(const std::string& kind) {
  const SafetensorsFile file = SafetensorsFile::Open(CdMoeFolder() / "cd-moe.safetensors");
  SourceBlocks blocks;
  blocks.name = kind;
  blocks.sequences.ids = ReadIntegers(file, kind + "_ids");
  const std::vector<int32_t> offsets = ReadIntegers(file, kind + "_offsets");
  blocks.sequences.offsets.assign(offsets.begin(), offsets.end());
  return {blocks};
}

inline constexpr uint64_t kAmpleBudget = uint64_t{1} << 40;

}  // namespace winnow
