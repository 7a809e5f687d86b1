#include "methods/naee_objective.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>

#include "base/error.h"

namespace winnow {
namespace {

constexpr std::array kObjectives = {NaeeObjective::kUnsquared, NaeeObjective::kSquared,
                                    NaeeObjective::kOutput, NaeeObjective::kStream};

}  // namespace

std::string_view NaeeObjectiveName(NaeeObjective objective) {
  switch (objective) {
    case NaeeObjective::kUnsquared:
      return "unsquared";
    case NaeeObjective::kSquared:
      return "squared";
    case NaeeObjective::kOutput:
      return "relative-to-output";
    case NaeeObjective::kStream:
      return "relative-to-stream";
  }
  return "";
}

std::vector<std::string> NaeeObjectiveNames() {
  std::vector<std::string> names;
  for (const NaeeObjective objective : kObjectives)
    names.emplace_back(NaeeObjectiveName(objective));
  return names;
}

NaeeObjective ParseNaeeObjective(const std::string& name) {
  for (const NaeeObjective objective : kObjectives) {
    if (name == NaeeObjectiveName(objective)) return objective;
  }
  throw UsageError(fmt::format("--objective: \"{}\" is not known", name),
                   fmt::format("one of {}", fmt::join(NaeeObjectiveNames(), ", ")));
}

}  // namespace winnow
