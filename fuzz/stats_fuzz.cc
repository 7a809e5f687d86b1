// stats.json as bytes, of either kind: refused with a ModelError, or statistics whose sizes add up
// and that survive writing.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "condense/condense_stats.h"
#include "observe/layer_stats.h"
#include "observe/stats_info.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow;
  try {
    const CondenseStats stats = CondenseStatsFromJson(
        ParseJson(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz"), "fuzz");
    const std::string written = CondenseStatsToJson(stats).dump();
    const CondenseStats again = CondenseStatsFromJson(ParseJson(written, "written"), "written");
    if (CondenseStatsToJson(again).dump() != written) std::abort();
  } catch (const ModelError&) {
  }
  try {
    const StatsInfo info = StatsInfoFromJson(
        ParseJson(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz"), "fuzz");
    const std::string written = StatsInfoToJson(info).dump();
    const StatsInfo again = StatsInfoFromJson(ParseJson(written, "written"), "written");
    if (StatsInfoToJson(again).dump() != written) std::abort();
    // More tokens than a real file of this size could hold would only cost time here.
    if (info.num_tokens() <= 1'000'000) {
      int64_t tokens = 0;
      for (const int64_t batch : info.BatchTokens()) {
        if (batch < 1) std::abort();
        tokens += batch;
      }
      if (tokens != info.num_tokens()) std::abort();
    }
    StatsBytes(info);  // refuses what overflows
  } catch (const ModelError&) {
  }
  return 0;
}
