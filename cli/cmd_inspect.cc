// winnow inspect: what a checkpoint is and what can be done with it.
#include <fmt/format.h>

#include <algorithm>

#include "base/units.h"
#include "forward/kv_cache.h"
#include "forward/layer_sweep.h"
#include "methods/naee.h"
#include "model/weight_parts.h"
#include "observe/observe_run.h"
#include "session.h"
#include "weights/layer_reader.h"

namespace winnow::cli {
namespace {

// The least memory observing needs for the default calibration set (128 x 512 tokens).
uint64_t ObserveBytes(const Model& model, int64_t num_blocks, int threads) {
  std::vector<SourceBlocks> blocks(1);
  blocks[0].name = "estimate";
  for (int64_t i = 0; i < num_blocks; ++i) {
    blocks[0].sequences.ids.insert(blocks[0].sequences.ids.end(), 512, 0);
    blocks[0].sequences.offsets.push_back(static_cast<int64_t>(blocks[0].sequences.ids.size()));
  }
  blocks[0].sequences.offsets.insert(blocks[0].sequences.offsets.begin(), 0);
  ObserveOptions options;
  options.memory_budget_bytes = UINT64_MAX;
  return PlanObserve(model, blocks, options, threads).memory.total_bytes();
}

// Experts of a layer may be packed in different formats.
uint64_t MeanExpertBytes(const Model& model, int32_t layer) {
  const LayerSlices& slices = model.layers()[static_cast<size_t>(layer)];
  return slices.ExpertBytes() / slices.experts.size();
}

OrderedJson PartsJson(const Model& model) {
  OrderedJson parts = OrderedJson::array();
  for (const WeightPart& part : WeightParts(model)) {
    parts.push_back({{"part", part.part},
                     {"format", part.format},
                     {"matrices", part.matrices},
                     {"weights", part.weights},
                     {"bytes", part.bytes},
                     {"bits_per_weight", part.bits_per_weight()}});
  }
  return parts;
}

int RunInspect(Session& session, const std::string& folder) {
  const Model model = Model::Open(folder);
  const ModelConfig& config = model.config();
  const std::vector<int32_t> moe = config.MoeLayers();
  uint64_t expert_bytes = 0, one_expert = 0, largest_layer = 0;
  for (const LayerSlices& layer : model.layers()) {
    expert_bytes += layer.ExpertBytes();
    largest_layer = std::max(largest_layer, layer.ExpertBytes() + layer.CommonBytes());
    if (!layer.experts.empty()) one_expert = layer.ExpertBytes() / layer.experts.size();
  }
  const uint64_t total = model.checkpoint().total_bytes();
  const int64_t k = config.num_experts_per_tok;
  // Layers may differ (num_experts_per_layer): what can be kept is bounded by the smallest.
  int64_t experts = 0, most_experts = 0;
  uint64_t active = total;
  for (const int32_t layer : moe) {
    const int64_t count = config.layers[static_cast<size_t>(layer)].num_experts;
    experts = experts == 0 ? count : std::min(experts, count);
    most_experts = std::max(most_experts, count);
    active -= static_cast<uint64_t>(count - k) * MeanExpertBytes(model, layer);
  }
  const std::string experts_text = experts == most_experts
                                       ? fmt::format("{}", experts)
                                       : fmt::format("{} to {}", experts, most_experts);
  const int threads = session.pool().num_threads();
  const uint64_t observe = moe.empty() ? 0 : ObserveBytes(model, 128, threads);
  std::vector<int64_t> exact;  // keeps NAEE can enumerate
  for (int64_t keep = std::max<int64_t>(k, 1); keep < experts; ++keep) {
    if (BinomialCoefficient(experts, keep) <= kMaxSubsets) exact.push_back(keep);
  }
  const uint64_t generate =
      LayerReader::AllLayersBytes(model, {}) + model.lm_head().bytes() +
      KeyValueCache::Bytes(config.num_layers(), config.num_kv_heads, config.head_dim, 2048) +
      kProgramBytes;
  MemoryPlan memory;
  memory.Add("program", kProgramBytes);
  memory.Add("names and places of tensors", model.checkpoint().tensors().size() * 1024);
  session.RequireMemory(memory, "inspect");
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.inspect/1"},
                       {"model_type", config.family->model_type},
                       {"fingerprint", model.checkpoint().FingerprintHex()},
                       {"parameters", model.parameter_count()},
                       {"active_parameters", model.active_parameter_count()},
                       {"bytes", total},
                       {"expert_bytes", expert_bytes},
                       {"bytes_per_expert", one_expert},
                       {"active_bytes", active},
                       {"num_layers", config.num_layers()},
                       {"moe_layers", moe},
                       {"num_experts", most_experts},
                       {"fewest_experts", experts},
                       {"num_experts_per_tok", k},
                       {"norm_topk_prob", config.norm_topk_prob},
                       {"hidden_size", config.hidden_size},
                       {"vocab_size", config.vocab_size},
                       {"memory", {{"observe", observe}, {"generate", generate}}},
                       {"exact_naee_keeps", exact},
                       {"parts", PartsJson(model)},
                       {"findings", model.findings()}});
    return 0;
  }
  const auto percent = [&](uint64_t part) {
    return 100.0 * static_cast<double>(part) / static_cast<double>(total);
  };
  session.Print(fmt::format("{}  ({}, {})", folder, config.family->model_type,
                            config.stored_dtype.empty() ? "unnamed dtype" : config.stored_dtype));
  session.Print(fmt::format(
      "  layers      {} ({} with experts), hidden {}, {} heads ({} kv) of {}, vocabulary {}",
      config.num_layers(), moe.size(), config.hidden_size, config.num_heads, config.num_kv_heads,
      config.head_dim, config.vocab_size));
  if (!moe.empty()) {
    session.Print(fmt::format(
        "  experts     {} a layer, {} per token{}, width {}, {}{}", experts_text, k,
        config.norm_topk_prob ? " (weights renormalised)" : "",
        config.layers[static_cast<size_t>(moe.front())].expert_width,
        FormatBytes(one_expert) + " each",
        config.layers[static_cast<size_t>(moe.front())].shared_width > 0 ? ", plus a shared expert"
                                                                         : ""));
  }
  session.Print(fmt::format("  parameters  {}, {} active per token",
                            FormatCount(model.parameter_count()),
                            FormatCount(model.active_parameter_count())));
  session.Print(fmt::format(
      "  weights     {} in {} file(s); experts {} ({:.0f} %), active per token {} ({:.0f} %)",
      FormatBytes(total), model.checkpoint().shards().size(), FormatBytes(expert_bytes),
      percent(expert_bytes), FormatBytes(active), percent(active)));
  if (config.is_packed()) {
    session.Print("  packed      part           format      matrices   bits per weight      size");
    for (const WeightPart& part : WeightParts(model)) {
      session.Print(fmt::format("              {:<14} {:<10} {:>9} {:>17.2f} {:>9}", part.part,
                                part.format, part.matrices, part.bits_per_weight(),
                                FormatBytes(part.bytes)));
    }
  }
  session.Print(fmt::format(
      "  memory      observe {} (128 blocks of 512), run {} (2,048 tokens), apply < 300 MiB",
      FormatBytes(observe), FormatBytes(generate)));
  if (experts > k) {
    session.Print(fmt::format("  can do      NAEE pruning, keeping {} to {} of {} experts", k,
                              experts - 1, experts));
    session.Print("  sizes       keep   weights   of the original   subsets searched by");
    const int64_t step = std::max<int64_t>(1, experts / 8);
    for (int64_t keep = experts - step; keep >= std::max(k, experts / 4); keep -= step) {
      uint64_t left = total;
      for (const int32_t layer : moe) {
        const int64_t count = config.layers[static_cast<size_t>(layer)].num_experts;
        left -= static_cast<uint64_t>(count - keep) * MeanExpertBytes(model, layer);
      }
      const bool enumerates = BinomialCoefficient(experts, keep) <= kMaxSubsets;
      session.Print(fmt::format("              {:>4} {:>9}   {:>3.0f} %             {}", keep,
                                FormatBytes(left), percent(left),
                                enumerates ? "enumeration" : "elimination and exchanges"));
    }
  }
  for (const std::string& finding : model.findings()) session.Print("  finding     " + finding);
  return 0;
}

}  // namespace

void AddInspect(CLI::App& app, Session& session) {
  auto folder = std::make_shared<std::string>();
  CLI::App* verb =
      app.add_subcommand("inspect", "What a checkpoint is, its sizes, what can be done with it");
  verb->add_option("MODEL", *folder, "Checkpoint folder")->required();
  session.AddMemoryFlag(*verb);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow inspect MODEL");
  verb->callback([&session, folder] {
    session.action = [&session, folder] { return RunInspect(session, *folder); };
  });
}

}  // namespace winnow::cli
