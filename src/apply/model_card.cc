#include "apply/model_card.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/units.h"

namespace winnow {

std::string CardFileName(const Checkpoint& source) {
  return fs::exists(source.folder() / "README.md") ? "WINNOW.md" : "README.md";
}

std::string CardChanges(const ApplyOptions& options) {
  std::string changes = options.changes;
  if (options.dtype) {
    changes += fmt::format("{}Weights were converted to {}.", changes.empty() ? "" : " ",
                           DtypeName(*options.dtype));
  }
  return changes;
}

std::string ModelCard(const CompressionPlan& plan, const RewritePlan& rewrite,
                      const std::string& changes, const std::string& measurements) {
  std::string card;
  if (plan.method == "finetune") {
    card = fmt::format("# A tuned checkpoint\n\nMade from a `{}` model with Winnow. {}\n\n",
                       plan.model_type, changes);
  } else {
    card = "# A pruned Mixture-of-Experts checkpoint\n\n";
    card += fmt::format("Experts were removed from a `{}` model with Winnow{}\n\n", plan.model_type,
                        changes.empty() ? "; no weight was changed otherwise." : ". " + changes);
  }
  card += "| | before | after |\n|---|--:|--:|\n";
  card += fmt::format("| experts, all layers | {} | {} |\n", rewrite.experts_before,
                      rewrite.experts_after);
  card += fmt::format("| weight files | {} | {} |\n\n", FormatBytes(rewrite.bytes_before),
                      FormatBytes(rewrite.bytes_after));
  card += fmt::format("- method: {} ({}, objective {})\n",
                      plan.method.empty() ? "by hand" : plan.method,
                      plan.search.empty() ? "no search" : plan.search,
                      plan.objective.empty() ? "none" : plan.objective);
  card += fmt::format(
      "- calibration: {} tokens of {}\n",
      FormatCount(static_cast<uint64_t>(plan.calibration_tokens)),
      plan.sources.empty() ? "unknown text" : fmt::format("{}", fmt::join(plan.sources, ", ")));
  card += fmt::format("- source fingerprint: `{}`\n", plan.model_fingerprint);
  card += "- the complete plan is in `winnow-plan.json`\n\n## Experts kept\n\n";
  card += "| layer | kept | loss | margin |\n|--:|---|--:|--:|\n";
  for (const LayerPlan& layer : plan.layers) {
    if (layer.condensed) {
      card += fmt::format(
          "| {} | condensed: no router; {} | | |\n", layer.layer,
          layer.kept.empty()
              ? "the shared expert alone"
              : fmt::format("{} for every token", fmt::join(layer.condensed->experts, " ")));
      continue;
    }
    card += fmt::format("| {} | {} | {} | {} |\n", layer.layer, fmt::join(layer.kept, " "),
                        layer.loss ? fmt::format("{:.6g}", *layer.loss) : "",
                        layer.margin ? fmt::format("{:.3g}", *layer.margin) : "");
  }
  if (!measurements.empty()) card += "\n## Measured\n\n" + measurements;
  return card;
}

}  // namespace winnow
