#include "healing.h"

#include <fmt/format.h>

#include <memory>

#include "base/units.h"
#include "evaluation.h"
#include "forward/moe_observer.h"

namespace winnow::cli {
namespace {

HealOptions MakeOptions(Session& session, const Model& model, const CompressionPlan& plan) {
  std::map<int32_t, std::vector<FusedPart>> condensed;
  for (const LayerPlan& layer : plan.layers) {
    if (layer.condensed) condensed[layer.layer] = FusedParts(layer, model.config());
  }
  return {.kept_experts = KeptExperts(plan, model.config().num_layers()),
          .condensed = std::move(condensed),
          .compute = session.compute(),
          .memory_budget_bytes = session.memory_budget(),
          .resume = session.flags.resume};
}

// Every healed matrix in `folder` at its place in the model.
WeightReplacements FindHealed(
    const Model& model, const fs::path& folder,
    std::map<int32_t, std::shared_ptr<const SafetensorsFile>>& condensed) {
  WeightReplacements weights;
  for (const int32_t layer : model.config().MoeLayers()) {
    const fs::path path = HealedLayerPath(folder, layer);
    if (!fs::exists(path)) continue;
    const auto file = std::make_shared<const SafetensorsFile>(SafetensorsFile::Open(path));
    const LayerSlices& slices = model.layers()[static_cast<size_t>(layer)];
    const auto add = [&](int32_t expert, const TensorSlice& down) {
      if (file->Find(HealedTensorName(expert)) != nullptr) {
        weights.Add(down, file, HealedTensorName(expert));
      }
    };
    for (size_t e = 0; e < slices.experts.size(); ++e) {
      add(static_cast<int32_t>(e), slices.experts[e].down);
    }
    if (slices.shared.down.exists()) add(kSharedPart, slices.shared.down);
    if (file->Find(HealedTensorName(kDensePart)) != nullptr) condensed[layer] = file;
  }
  return weights;
}

}  // namespace

HealPlan PrepareHeal(Session& session, const Model& model, const CompressionPlan& plan,
                     const std::vector<SourceBlocks>& sources) {
  const HealPlan heal =
      PlanHeal(model, sources, MakeOptions(session, model, plan), session.pool().num_threads());
  session.RequireMemory(heal.memory, "heal");
  session.Note(fmt::format(
      "heal: {} tokens fit the survivors' down projections, {} judge the result; {} of memory",
      FormatCount(static_cast<uint64_t>(heal.fit.num_tokens())),
      FormatCount(static_cast<uint64_t>(heal.confirm.inputs.num_tokens())),
      FormatBytes(heal.memory.total_bytes())));
  return heal;
}

Healing Heal(Session& session, const Model& model, const CompressionPlan& plan,
             const HealPlan& heal, const fs::path& folder) {
  Healing healing;
  healing.result = RunHeal(model, MakeOptions(session, model, plan), heal, folder, session.pool(),
                           session.control());
  const HealResult& result = healing.result;
  OrderedJson layers = OrderedJson::array();
  std::string table = "  layer  error of the stream on held-out tokens   lambda\n";
  for (const HealedLayer& layer : result.layers) {
    table += fmt::format(
        "  {:>5}  {:.4f} -> {:.4f}{:>20}{}\n", layer.layer, layer.error_before, layer.error_after,
        layer.lambda > 0 ? fmt::format("{:g}", layer.lambda) : "unchanged",
        layer.skipped_experts > 0
            ? fmt::format("   {} experts have too few tokens and keep their weights",
                          layer.skipped_experts)
            : "");
    layers.push_back({{"layer", layer.layer},
                      {"lambda", layer.lambda},
                      {"error_before", layer.error_before},
                      {"error_after", layer.error_after},
                      {"skipped_experts", layer.skipped_experts}});
  }
  session.Note(table);
  healing.json = {{"fit_tokens", heal.fit.num_tokens()}, {"layers", layers}};
  const PairedDifference gain = Compare(result.pruned, result.healed);
  const std::string summary = fmt::format(
      "nll on {} calibration tokens no fit has seen: intact {:.4f}, pruned {:.4f}, "
      "healed {:.4f} ({:+.4f} +- {})",
      FormatCount(static_cast<uint64_t>(result.healed.tokens)), result.intact.nll,
      result.pruned.nll, result.healed.nll, gain.nll, FormatStandardError(gain.standard_error));
  session.Note(summary);
  healing.json["judging_tokens"] = result.healed.tokens;
  healing.json["nll_intact"] = result.intact.nll;
  healing.json["nll_pruned"] = result.pruned.nll;
  healing.json["nll_healed"] = result.healed.nll;
  healing.json["kept"] = result.improves();
  if (result.improves()) {
    healing.weights = FindHealed(model, folder, healing.condensed);
    healing.card =
        fmt::format("Healed: {} down projections refitted by ridge regression on {} tokens; {}.\n",
                    healing.weights.size() + healing.condensed.size(),
                    FormatCount(static_cast<uint64_t>(heal.fit.num_tokens())), summary);
  } else {
    session.Note("healing did not help here: the experts keep their weights");
    healing.card = fmt::format("Healing was tried and not kept: {}.\n", summary);
  }
  return healing;
}

}  // namespace winnow::cli
