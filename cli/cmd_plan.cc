// winnow plan: from statistics to a decision per layer.
#include <fmt/format.h>

#include <cmath>

#include "base/error.h"
#include "base/file.h"
#include "plan/loader_target.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct PlanFlags {
  std::string stats, output, method = "naee", search = "auto", target = "transformers",
                             objective = "unsquared", budget = "uniform";
  int64_t keep = 0, floor = 0;
  double ratio = 0, active = 0, max_error = 0;
  bool compare = false;
};

SubsetSearch ParseSearch(const std::string& name) {
  if (name == "enumerate") return SubsetSearch::kEnumerate;
  if (name == "eliminate") return SubsetSearch::kEliminate;
  return SubsetSearch::kAuto;
}

int WritePlan(Session& session, const PlanFlags& flags, const CompressionPlan& plan) {
  const OrderedJson json = PlanToJson(plan);
  if (!flags.output.empty() && !session.flags.dry_run) {
    WriteFileAtomically(flags.output, json.dump(1) + "\n");
  }
  if (session.flags.json) {
    session.PrintJson(json);
  } else {
    session.Print(DescribePlan(plan));
    if (flags.output.empty()) session.Note("nothing was written; give -o PLAN to keep it");
  }
  return 0;
}

int PlanSkipping(Session& session, const PlanFlags& flags) {
  if (flags.keep > 0 || flags.ratio > 0 || flags.compare) {
    throw UsageError("naee-skip removes no experts: it takes no --keep, --ratio or --compare",
                     "to do both, observe with --plan PRUNING and plan skipping from that");
  }
  if (flags.active > 0 && flags.max_error > 0) {
    throw UsageError("give either --active or --max-error",
                     "both are budgets for skipping; without one the medians are taken");
  }
  if (!flags.output.empty()) RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  std::optional<SkipBudget> budget;
  if (flags.active > 0) budget = SkipBudget{.active_experts = flags.active, .max_error = {}};
  if (flags.max_error > 0) budget = SkipBudget{.active_experts = {}, .max_error = flags.max_error};
  const StatsInfo info = ReadStatsInfo(flags.stats);
  return WritePlan(session, flags,
                   MakeSkippingPlan(session, flags.stats, info, budget, flags.target));
}

int RunPlan(Session& session, PlanFlags& flags) {
  if (flags.method == "naee-skip") return PlanSkipping(session, flags);
  if (flags.active > 0 || flags.max_error > 0) {
    throw UsageError("--active and --max-error belong to --method naee-skip",
                     "they skip experts at run time; --keep or --ratio remove them");
  }
  if ((flags.keep > 0) == (flags.ratio > 0)) {
    throw UsageError("give either --keep R (experts kept) or --ratio X (share removed)");
  }
  if (!flags.output.empty()) RequireFreshOutput(flags.output, OutputKind::kFile, session.flags);
  const StatsInfo info = ReadStatsInfo(flags.stats);
  int64_t keep = flags.keep;
  if (flags.ratio > 0) {
    const int64_t experts = info.layers.front().num_experts;
    keep = experts - static_cast<int64_t>(std::llround(flags.ratio * static_cast<double>(experts)));
    session.Note(fmt::format(
        "removing {} of {} experts ({:.1f} %): keeping {}", experts - keep, experts,
        100.0 * static_cast<double>(experts - keep) / static_cast<double>(experts), keep));
  }
  const NaeeOptions options{.keep = keep,
                            .search = ParseSearch(flags.search),
                            .objective = ParseNaeeObjective(flags.objective)};
  const bool uneven = flags.budget == "uneven";
  if (uneven && (flags.method != "naee" || flags.compare)) {
    throw UsageError("--budget uneven divides survivors by NAEE's errors: it needs --method naee",
                     "leave out --method and --compare");
  }
  if (uneven && (flags.objective != "unsquared" || flags.search != "auto")) {
    throw UsageError("--budget uneven takes neither --objective nor --search",
                     "it compares layers by the error relative to the stream, by elimination");
  }
  if (flags.method != "naee" && (flags.objective != "unsquared" || flags.search != "auto")) {
    throw UsageError(
        fmt::format("--method {} takes neither --objective nor --search", flags.method),
        "both belong to --method naee");
  }
  if (flags.floor > 0 && !uneven) {
    throw UsageError("--floor belongs to --budget uneven",
                     "leave it out: --keep is the number in every layer");
  }
  if (flags.compare) {
    ComparePruning(session, flags.stats, info, options);
    return 0;
  }
  const CompressionPlan plan = MakePruningPlan(
      session, flags.stats, info, {flags.method, options, uneven, flags.floor}, flags.target);
  if (uneven) {
    session.Note(
        "not confirmed: eval ppl MODEL --plan shows it against a uniform plan on other text "
        "(compress does so by itself)");
  }
  return WritePlan(session, flags, plan);
}

}  // namespace

void AddPlan(CLI::App& app, Session& session) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* verb = app.add_subcommand("plan", "Decide from statistics what to remove, in seconds");
  verb->add_option("STATS", flags->stats, "Statistics folder")->required();
  verb->add_option("--method", flags->method,
                   "naee (least loss of the output), a score (frequency, seer, ean, weighted-ean, "
                   "reap, man, msan, leave-one-out), or naee-skip: skip experts at run time");
  verb->add_option(
      "--objective", flags->objective,
      "naee: unsquared (as published), squared, relative-to-output, relative-to-stream");
  verb->add_option("--budget", flags->budget,
                   "naee: uniform, or uneven: R x layers survivors in all, where they matter most")
      ->check(CLI::IsMember({"uniform", "uneven"}));
  verb->add_option("--floor", flags->floor, "Fewest survivors of a layer with --budget uneven")
      ->check(WholeNumberFrom(1));
  verb->add_option("--active", flags->active,
                   "naee-skip: mean experts a token, spent where it costs least (default: medians)")
      ->check(NumberFromTo(1, 128));
  verb->add_option("--max-error", flags->max_error,
                   "naee-skip: skip until the layers' relative errors add up to this")
      ->check(NumberFromTo(1e-9, 1e3));
  verb->add_flag("--compare", flags->compare, "Show what every method would drop; write nothing");
  verb->add_option("--search", flags->search,
                   "enumerate, eliminate (then exchanges), or auto: by the number of subsets")
      ->check(CLI::IsMember({"auto", "enumerate", "eliminate"}));
  verb->add_option("--keep", flags->keep, "Experts kept in each layer")->check(WholeNumberFrom(1));
  verb->add_option("--ratio", flags->ratio, "Share of experts removed, e.g. 0.25")
      ->check(NumberFromTo(0.001, 0.999));
  verb->add_option("--target", flags->target,
                   "Loader the result must satisfy: transformers, vllm, llama.cpp, winnow");
  verb->add_option("-o,--output", flags->output, "plan.json to write")->transform(OutputPath);
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, false);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow plan STATS --keep 6 -o plan.json");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunPlan(session, *flags); };
  });
}

}  // namespace winnow::cli
