#include "sizing_candidates.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <sstream>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "base/units.h"
#include "mixing.h"
#include "quantize/packed_layout.h"
#include "quantizing.h"

namespace winnow::cli {
namespace {

// Experts' worth left that are tried where bits make up the rest of the size, as shares of all.
constexpr double kSharesLeft[] = {1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Predicts what bits cost for experts that are left, from errors measured once with all of them.
class BitsPredictor {
 public:
  BitsPredictor(Session& session, const Model& model, const StatsInfo& info,
                const SizeRequest& request, const std::vector<SourceBlocks>& fitting)
      : model_(model), info_(info), request_(request), formats_(ExpertCandidates(request.experts)) {
    PackedFormat fewest = formats_.front();
    const QuantizePlan smallest = UniformQuantizePlan(model, fewest, request.rest);
    CheckQuantizePlan(model, smallest);
    rest_bytes_ = QuantizedFileBytes(model, smallest);
    for (const StatsLayer& layer : info.layers) {
      for (const FeedForwardSlices& expert : ExpertsOf(layer)) {
        rest_bytes_ -= std::min(rest_bytes_, PackedExpertBytes(expert, fewest));
      }
    }
    const CalibrateOptions options{.relative_to_result = true,
                                   .compute = session.compute(),
                                   .memory_budget_bytes = session.memory_budget()};
    const CalibratePlan plan =
        PlanCalibrate(model, fitting, smallest, options, session.pool().num_threads());
    session.RequireMemory(plan.memory, "measure");
    errors_ =
        MeasureExpertErrors(model, formats_, options, plan, request.spill_folder / "measure.spill",
                            session.pool(), session.control());
    session.FinishProgress();
    num_tokens_ = static_cast<double>(std::max<int64_t>(plan.tokens.num_tokens(), 1));
  }

  // Of all but the experts that the plan keeps under a router.
  uint64_t RestBytes(const CompressionPlan& plan) const {
    uint64_t bytes = rest_bytes_;
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const LayerPlan& layer = plan.layers[i];
      if (!layer.condensed) continue;
      const FeedForwardSlices& expert = ExpertsOf(info_.layers[i]).front();
      const uint64_t each = request_.rest.empty() ? info_.layers[i].expert_bytes
                                                  : PackedExpertBytes(expert, request_.rest);
      bytes += each * static_cast<uint64_t>(WorthOf(layer));
    }
    return bytes;
  }

  // All files with the fewest bits.
  uint64_t SmallestBytes(const CompressionPlan& plan) const {
    uint64_t bytes = RestBytes(plan);
    for (const AllocationItem& item : Items(plan)) bytes += item.bytes.front();
    return bytes;
  }

  // The least error within the size, by layer, weighed by `sensitivities`.
  double Cost(const CompressionPlan& plan, const std::vector<double>& sensitivities) const {
    std::vector<size_t> layers;
    const std::vector<AllocationItem> items = Items(plan, &layers);
    const Allocation found = AllocateBits(items, request_.bytes - RestBytes(plan));
    double cost = 0;
    for (size_t i = 0; i < found.choice.size(); ++i) {
      const auto choice = static_cast<size_t>(found.choice[i]);
      cost += sensitivities[layers[i]] * items[i].error[choice] / num_tokens_;
    }
    return cost;
  }

  // Experts' worth of neurons that a condensed layer keeps.
  int64_t WorthOf(const LayerPlan& layer) const {
    size_t rows = 0;
    for (const std::vector<int32_t>& neurons : layer.condensed->neurons) rows += neurons.size();
    const int64_t width = model_.config().layers[static_cast<size_t>(layer.layer)].expert_width;
    return (static_cast<int64_t>(rows) + width - 1) / std::max<int64_t>(width, 1);
  }

 private:
  const std::vector<FeedForwardSlices>& ExpertsOf(const StatsLayer& layer) const {
    return model_.layers()[static_cast<size_t>(layer.layer)].experts;
  }

  // The experts that stay under a router. A token still uses k of them: together they make as large
  // an error as all did.
  std::vector<AllocationItem> Items(const CompressionPlan& plan,
                                    std::vector<size_t>* layers = nullptr) const {
    std::vector<AllocationItem> items;
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const LayerPlan& layer = plan.layers[i];
      if (layer.condensed) continue;
      const std::vector<std::vector<double>>& errors = errors_[i].error;
      double all = 0, kept = 0;
      for (const std::vector<double>& error : errors) all += error.front();
      for (const int32_t e : layer.kept) kept += errors[static_cast<size_t>(e)].front();
      for (const int32_t e : layer.kept) {
        const auto expert = static_cast<size_t>(e);
        AllocationItem item;
        for (size_t f = 0; f < formats_.size(); ++f) {
          item.bytes.push_back(PackedExpertBytes(ExpertsOf(info_.layers[i])[expert], formats_[f]));
          item.error.push_back(errors[expert][f] * (kept > 0 ? all / kept : 1));
        }
        items.push_back(std::move(item));
        if (layers != nullptr) layers->push_back(i);
      }
    }
    return items;
  }

  const Model& model_;
  const StatsInfo& info_;
  const SizeRequest& request_;
  std::vector<PackedFormat> formats_;
  std::vector<LayerErrors> errors_;
  uint64_t rest_bytes_ = 0;
  double num_tokens_ = 1;
};

// The model as it is.
CompressionPlan KeepingAll(const StatsInfo& info) {
  CompressionPlan plan;
  for (const StatsLayer& layer : info.layers) {
    LayerPlan entry;
    entry.layer = layer.layer;
    entry.num_experts = layer.num_experts;
    entry.kept = OtherExperts({}, layer.num_experts);
    entry.loss = 0;
    plan.layers.push_back(std::move(entry));
  }
  return plan;
}

bool SameLayers(const CompressionPlan& a, const CompressionPlan& b) {
  return std::equal(a.layers.begin(), a.layers.end(), b.layers.begin(), b.layers.end(),
                    [](const LayerPlan& x, const LayerPlan& y) {
                      return x.kept == y.kept && x.condensed.has_value() == y.condensed.has_value();
                    });
}

// Asks the planner for a total with the means that are allowed.
class Remover {
 public:
  Remover(Session& session, const Model& model, const StatsInfo& info, const SizeRequest& request)
      : info_(info), sensitivities_(info.layers.size(), 1.0) {
    const Means& means = request.means;
    if (!means.removes()) return;
    planner_.emplace(session, model, info, request.stats, request.neurons.string(),
                     request.spill_folder.string());
    sensitivities_ = planner_->sensitivities();
    const double pruning = request.heals ? kHealedShare : 1;
    if (means.drop && means.condense) weights_.push_back({pruning, 1});
    // By themselves too: the mix knows nothing of bits, and experts bear fewer than a condensed
    // layer.
    if (means.drop) weights_.push_back({pruning, kInfinity});
    if (means.condense) weights_.push_back({kInfinity, 1});
  }

  // Different plans that leave so many; none if there is none.
  std::vector<SizeCandidate> Left(int64_t experts) const {
    std::vector<SizeCandidate> candidates;
    if (experts == info_.num_experts()) {
      candidates.push_back({.experts_left = experts, .plan = KeepingAll(info_)});
      return candidates;
    }
    for (const MixWeights& weights : weights_) {
      SizeCandidate candidate{.experts_left = experts, .plan = {}};
      try {
        candidate.plan = planner_->Decide(experts, weights);
      } catch (const UsageError&) {
        continue;  // no division of this number
      }
      const bool known = std::any_of(
          candidates.begin(), candidates.end(),
          [&](const SizeCandidate& other) { return SameLayers(candidate.plan, other.plan); });
      if (known) continue;
      for (const LayerPlan& layer : candidate.plan.layers) {
        candidate.removal_cost += layer.loss.value_or(0);
      }
      candidates.push_back(std::move(candidate));
    }
    return candidates;
  }
  const std::vector<double>& sensitivities() const { return sensitivities_; }

 private:
  const StatsInfo& info_;
  std::optional<MixPlanner> planner_;
  std::vector<MixWeights> weights_;
  std::vector<double> sensitivities_;
};

[[noreturn]] void RefuseSize(const SizeRequest& request, uint64_t smallest, int64_t experts) {
  throw QualityError(
      fmt::format("--size: within {} nothing fits by {}: the weights still take {} with {} "
                  "experts' worth left",
                  FormatBytes(request.bytes), DescribeMeans(request.means), FormatBytes(smallest),
                  experts),
      "give a larger size, more --means, or fewer bits to the rest (--bits-of-rest)");
}

// More experts' worth than these never fit: what is no expert's and no router's stays in every
// plan. The bytes themselves are not monotone in the experts left, because a plan with one more may
// condense more layers, whose routers go.
int64_t MostThatCouldFit(const Model& model, const StatsInfo& info, uint64_t bytes) {
  uint64_t rest = model.checkpoint().total_bytes(), each = std::numeric_limits<uint64_t>::max();
  for (const StatsLayer& layer : info.layers) {
    const uint64_t routed = layer.expert_bytes * static_cast<uint64_t>(layer.num_experts) +
                            model.layers()[static_cast<size_t>(layer.layer)].router.bytes();
    rest -= std::min(rest, routed);
    each = std::min(each, layer.expert_bytes);
  }
  const uint64_t most = (bytes - std::min(rest, bytes)) / std::max<uint64_t>(each, 1);
  return static_cast<int64_t>(std::min(most, static_cast<uint64_t>(info.num_experts() - 1)));
}

// As many experts' worth as fit, in the formats they have.
std::vector<SizeCandidate> LargestThatFit(const Model& model, const StatsInfo& info,
                                          const SizeRequest& request, const Remover& remover) {
  uint64_t smallest = model.checkpoint().total_bytes();
  int64_t fewest = info.num_experts();
  const auto fitting_with = [&](int64_t experts) {
    std::vector<SizeCandidate> fitting;
    for (SizeCandidate& candidate : remover.Left(experts)) {
      const uint64_t bytes =
          PlanRewrite(model, candidate.plan, {.condensed_form = CondensedForm::kFused}).bytes_after;
      if (bytes <= request.bytes) fitting.push_back(std::move(candidate));
      smallest = std::min(smallest, bytes);
      fewest = experts;
    }
    SortByCost(fitting, 0);
    return fitting;
  };
  const int64_t most = MostThatCouldFit(model, info, request.bytes);
  for (int64_t experts = most; experts >= 0; --experts) {
    std::vector<SizeCandidate> fitting = fitting_with(experts);
    if (!fitting.empty()) return fitting;
  }
  // No division leaves so few: what the fewest would take.
  for (int64_t experts = most + 1; experts < info.num_experts() && fewest > experts; ++experts) {
    fitting_with(experts);
  }
  RefuseSize(request, smallest, fewest);
}

}  // namespace

Means ParseMeans(const std::string& text) {
  if (text.empty()) return {};
  Means means{.drop = false, .condense = false, .bits = false};
  std::stringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    bool* const known = word == "drop"       ? &means.drop
                        : word == "condense" ? &means.condense
                        : word == "bits"     ? &means.bits
                                             : nullptr;
    if (known == nullptr) {
      throw UsageError(fmt::format("--means: \"{}\" is not one of drop, condense, bits", word),
                       "e.g. --means drop,bits");
    }
    *known = true;
  }
  return means;
}

std::string DescribeMeans(const Means& means) {
  std::vector<std::string> words;
  if (means.drop) words.emplace_back("drop");
  if (means.condense) words.emplace_back("condense");
  if (means.bits) words.emplace_back("bits");
  return fmt::format("{}", fmt::join(words, ", "));
}

int64_t SizeCandidate::condensed_layers() const {
  return std::count_if(plan.layers.begin(), plan.layers.end(),
                       [](const LayerPlan& layer) { return layer.condensed.has_value(); });
}

std::vector<SizeCandidate> PredictCandidates(Session& session, const Model& model,
                                             const StatsInfo& info, const SizeRequest& request,
                                             const std::vector<SourceBlocks>& fitting) {
  const Remover remover(session, model, info, request);
  if (!request.means.bits) return LargestThatFit(model, info, request, remover);
  const BitsPredictor bits(session, model, info, request, fitting);
  std::vector<SizeCandidate> candidates;
  uint64_t smallest = model.checkpoint().total_bytes();
  int64_t fewest = info.num_experts();
  for (const double share : kSharesLeft) {
    const auto experts =
        static_cast<int64_t>(share * static_cast<double>(info.num_experts()) + 0.5);
    for (SizeCandidate& candidate : remover.Left(experts)) {
      const uint64_t bytes = bits.SmallestBytes(candidate.plan);
      if (bytes < smallest) {
        smallest = bytes;
        fewest = experts;
      }
      if (bytes > request.bytes) continue;
      candidate.bits_cost = bits.Cost(candidate.plan, remover.sensitivities());
      candidates.push_back(std::move(candidate));
    }
  }
  if (candidates.empty()) RefuseSize(request, smallest, fewest);
  return candidates;
}

void SortByCost(std::span<SizeCandidate> candidates, double rounding_share) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const SizeCandidate& a, const SizeCandidate& b) {
                     return a.predicted(rounding_share) < b.predicted(rounding_share);
                   });
}

}  // namespace winnow::cli
