#include "sizing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>

#include "apply/model_card.h"
#include "base/error.h"
#include "base/units.h"
#include "condense/condense_run.h"
#include "healing.h"
#include "methods/naee.h"
#include "observe/layer_stats.h"
#include "pruning.h"
#include "quantizing.h"
#include "sizing_candidates.h"

namespace winnow::cli {
namespace {

// Candidates that are made and measured, of those predicted.
constexpr size_t kMeasuredCandidates = 2;
// What compensated rounding leaves of the predicted cost of plain rounding, until bits alone have
// shown it for this model and size: of the order that sample-deepseek and sample-mixtral have.
constexpr double kUsualRoundingShare = 0.02;
constexpr double kLeastRoundingShare = 0.001;
// Experts' worth that a condensed layer may keep, as observe --method condense has it.
constexpr int64_t kMostCondensedWidth = 6;
// Neurons of a layer that are compared; if it has more, whole experts are, which takes seconds.
constexpr int64_t kMostComparedNeurons = 8192;

int64_t MostNeurons(const ModelConfig& config, int64_t width) {
  const bool all =
      std::all_of(config.layers.begin(), config.layers.end(), [&](const LayerConfig& layer) {
        return !layer.is_moe || CandidateNeurons(config, layer, width, kMostComparedNeurons) ==
                                    layer.num_experts * layer.expert_width;
      });
  return all ? kMostComparedNeurons : 0;
}

PackedFormat RestFormat(const CompressFlags& flags) {
  if (flags.bits_of_rest == "stored") return {};
  const std::string name = flags.bits_of_rest.empty() ? "8bit" : flags.bits_of_rest;
  if (const auto format = FormatFromFlag(name)) return *format;
  throw UsageError(fmt::format("--bits-of-rest {}: no format of that name", name),
                   "8bit, 6bit, 4bit, with a grid (-asym) and a group (-g64) behind it, or stored");
}

// What is gathered before anything is decided, planned first.
struct Gathering {
  std::optional<ObservePlan> observe;
  std::optional<CondensePlan> condense;
  CondenseOptions condense_options;
  StatsInfo info;
};

// A candidate that exists.
struct Made {
  fs::path folder;
  PerplexityResult judged;
  std::vector<std::pair<std::string, int64_t>> bits;  // formats of experts
  OrderedJson healing;
  std::string card_name;
};

uint64_t WeightFileBytes(const fs::path& folder) {
  uint64_t bytes = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") bytes += entry.file_size();
  }
  return bytes;
}

class Sizing {
 public:
  Sizing(Session& session, CompressFlags& flags, const Model& model,
         const std::vector<SourceBlocks>& sources)
      : session_(session),
        flags_(flags),
        model_(model),
        sources_(sources),
        fitting_(FittingSequences(sources)),
        judge_{{"calibration", JudgingSequences(sources)}},
        work_(flags.output + ".work") {
    request_.means = ParseMeans(flags.means);
    request_.bytes = ParseBytes(flags.size, "--size");
    request_.experts = BestFormat(4);
    request_.rest = RestFormat(flags);
    request_.heals = !flags.no_heal;
    request_.spill_folder = work_;
    if (request_.means.removes()) request_.stats = work_ / "stats";
    if (request_.means.condense) request_.neurons = work_ / "neurons";
  }

  // Everything that can be refused is, before anything is written.
  void Prepare() {
    const uint64_t bytes = model_.checkpoint().total_bytes();
    if (bytes <= request_.bytes) {
      throw UsageError(fmt::format("--size {}: the model has {} of weights, which fits already",
                                   flags_.size, FormatBytes(bytes)),
                       "give a smaller size, or say with --keep how many experts are to stay");
    }
    gathering_.info = DescribeModel(model_);
    if (gathering_.info.layers.empty()) {
      throw UsageError("the model has no MoE layer", "winnow quantize takes any model");
    }
    if (model_.config().has_packed_experts()) {
      throw UsageError("the model's experts are packed already",
                       "give the model as it was before quantising");
    }
    if (!request_.means.removes()) return;
    flags_.observe.level = StatsLevel::kFull;
    gathering_.observe =
        PrepareObserve(session_, model_, sources_, flags_.observe, request_.stats.string());
    gathering_.info = gathering_.observe->info;
    if (request_.means.drop) {
      CheckNaee(gathering_.info, {.keep = gathering_.info.num_experts_per_tok});
    }
    if (request_.means.condense) PrepareCondense();
  }

  void PrintDryRun() {
    OrderedJson work =
        gathering_.observe ? DescribeObserve(*gathering_.observe) : OrderedJson::object();
    work["means"] = DescribeMeans(request_.means);
    session_.PrintDryRun("compress", work);
  }

  // Statistics, from an earlier unfinished run if it got that far.
  void Gather() {
    if (!session_.flags.resume) fs::remove_all(work_);
    fs::create_directories(work_);
    // Of an earlier run all but statistics is made anew.
    for (const fs::directory_entry& entry : fs::directory_iterator(work_)) {
      const std::string name = entry.path().filename().string();
      if (!name.starts_with("stats") && !name.starts_with("neurons") && name != kReplacesName) {
        fs::remove_all(entry.path());
      }
    }
    if (fs::exists(flags_.output)) WriteFileAtomically(work_ / kReplacesName, "");
    if (gathering_.observe &&
        !HasFinishedStats(session_, request_.stats, gathering_.observe->info)) {
      RunObserve(model_, sources_, flags_.observe, *gathering_.observe, request_.stats,
                 session_.pool(), session_.control());
      session_.FinishProgress();
    }
    if (gathering_.observe) ReportCoverage(session_, request_.stats, gathering_.info);
    if (gathering_.condense && !HasFinishedNeurons()) {
      RunCondense(model_, gathering_.condense_options, *gathering_.condense, request_.neurons,
                  session_.pool(), session_.control());
      session_.FinishProgress();
    }
  }

  // Makes the best candidates and keeps the best of them.
  void Choose() {
    intact_ = Judge(model_);
    candidates_ = PredictCandidates(session_, model_, gathering_.info, request_, fitting_);
    std::span<SizeCandidate> others = candidates_;
    if (KeepsAllExperts(others.front())) {
      TryToMake(others.front());
      others = others.subspan(1);
    }
    SortByCost(others, rounding_share_);
    for (const SizeCandidate& candidate : others) {
      session_.Note(fmt::format("candidate: {}; predicted {:.4g} ({:.4g} of it by bits)",
                                Describe(candidate), candidate.predicted(rounding_share_),
                                rounding_share_ * candidate.bits_cost));
    }
    for (const SizeCandidate& candidate : others) {
      if (made_ == kMeasuredCandidates) break;
      TryToMake(candidate);
    }
    if (!best_) {
      throw QualityError(
          fmt::format("--size {}: no candidate fits once it is written", flags_.size),
          "give a larger size");
    }
    const uint64_t bytes = WeightFileBytes(best_->folder);
    if (bytes > request_.bytes) {
      throw RuntimeError(
          fmt::format("{}: the weight files take {}, more than {}", best_->folder.string(),
                      FormatBytes(bytes), FormatBytes(request_.bytes)),
          "this is a fault of winnow; a smaller --size goes round it");
    }
  }

  // The gate of --max-ppl-increase.
  void RequireIncrease() const {
    if (flags_.max_increase.empty()) return;
    const double limit = ParseIncrease(flags_.max_increase);
    if (increase() <= limit) return;
    fs::remove_all(best_->folder);
    throw QualityError(
        fmt::format("perplexity on the judging sequences rises by {:.2f} %, more than {:.2f} %",
                    100 * increase(), 100 * limit),
        fmt::format("allow more or give a larger size: --resume goes on from the statistics in {}",
                    work_.string()));
  }

  TextMeasurements Measure(const std::vector<EvalText>& texts, const PerplexityProtocol& protocol) {
    TextMeasurements measured;
    std::string card = fmt::format("\n## Chosen for a size\n\nBy {}: {}.\n",
                                   DescribeMeans(request_.means), Summary());
    if (!texts.empty()) {
      measured = MeasureTexts(session_, model_, Model::Open(best_->folder.string()), texts,
                              protocol, work_.string());
      card += "\n## Measured\n\n" + measured.card;
    }
    const fs::path path = best_->folder / best_->card_name;
    WriteFileAtomically(path, ReadTextFile(path) + card);
    return measured;
  }

  void Publish() {
    fs::remove_all(flags_.output);
    RenameDurably(best_->folder, flags_.output);
    fs::remove(work_ / kReplacesName);
    best_->folder = flags_.output;
  }

  // "90 of 120 experts' worth left, 1 of 5 layers condensed, 40 x 3bit 50 x 4bit, 3.1 MiB"
  std::string Summary() const {
    std::string bits;
    for (const auto& [format, count] : best_->bits) bits += fmt::format(", {} x {}", count, format);
    return fmt::format("{}{}, {}", Describe(*chosen_), bits,
                       FormatBytes(WeightFileBytes(best_->folder)));
  }

  OrderedJson Json() const {
    OrderedJson bits = OrderedJson::object();
    for (const auto& [format, count] : best_->bits) bits[format] = count;
    OrderedJson json = {{"schema", "winnow.compress/1"},
                        {"output", flags_.output},
                        {"bytes_before", model_.checkpoint().total_bytes()},
                        {"bytes_after", WeightFileBytes(best_->folder)},
                        {"seconds", session_.seconds()},
                        {"peak_rss_bytes", PeakResidentBytes()},
                        {"means", DescribeMeans(request_.means)},
                        {"experts_left", chosen_->experts_left},
                        {"condensed_layers", chosen_->condensed_layers()},
                        {"bits", bits},
                        {"candidates", measured_},
                        {"judged_increase", increase()},
                        {"plan", PlanToJson(chosen_->plan)}};
    if (!best_->healing.is_null()) json["healing"] = best_->healing;
    return json;
  }

 private:
  void PrepareCondense() {
    int64_t width = kMostCondensedWidth;
    for (const StatsLayer& layer : gathering_.info.layers) {
      width = std::min(width, layer.num_experts);
    }
    gathering_.condense_options = {.method = CondenseMethod::kNeurons,
                                   .max_experts = width,
                                   .most_neurons = MostNeurons(model_.config(), width),
                                   .compute = session_.compute(),
                                   .resume = session_.flags.resume,
                                   .memory_budget_bytes = session_.memory_budget()};
    gathering_.condense = PlanCondense(model_, sources_, {}, gathering_.condense_options,
                                       session_.pool().num_threads());
    session_.RequireMemory(gathering_.condense->memory, "observe neurons");
  }

  bool HasFinishedNeurons() const {
    if (!session_.flags.resume || !fs::exists(request_.neurons / "stats.json")) return false;
    const CondenseStats found = ReadCondenseStats(request_.neurons);
    const CondenseStats& expected = gathering_.condense->stats;
    if (found.model_fingerprint == expected.model_fingerprint &&
        found.search_fingerprint == expected.search_fingerprint &&
        found.max_experts == expected.max_experts && found.most_neurons == expected.most_neurons &&
        found.compute == expected.compute) {
      return true;
    }
    throw UsageError(
        fmt::format("{} was made with another model, text or flag", request_.neurons.string()),
        "repeat the command as it was, or start again with --force");
  }

  std::string Describe(const SizeCandidate& candidate) const {
    std::string text = fmt::format("{} of {} experts' worth left", candidate.experts_left,
                                   gathering_.info.num_experts());
    if (candidate.condensed_layers() > 0) {
      text += fmt::format(", {} of {} layers condensed", candidate.condensed_layers(),
                          gathering_.info.layers.size());
    }
    return text;
  }

  // Bits alone make it smaller then: without bits no candidate is so.
  bool KeepsAllExperts(const SizeCandidate& candidate) const {
    return candidate.experts_left == gathering_.info.num_experts();
  }

  PerplexityResult Judge(const Model& model) {
    return Evaluate(session_, model, judge_, {.skip_betas = SkippingOf(model, "", false)},
                    work_.string())
        .texts.front();
  }
  double increase() const { return std::exp(best_->judged.nll - intact_.nll) - 1; }

  Made Make(const SizeCandidate& candidate) {
    Made made;
    made.folder = work_ / fmt::format("candidate-{}", made_);
    if (KeepsAllExperts(candidate)) {
      Quantize(model_, made);
    } else if (!request_.means.bits) {
      Remove(candidate, made.folder, made);
    } else {
      const fs::path unpacked = work_ / fmt::format("unpacked-{}", made_);
      Remove(candidate, unpacked, made);
      Quantize(Model::Open(unpacked.string()), made);
      fs::remove_all(unpacked);
    }
    made.judged = Judge(Model::Open(made.folder.string()));
    return made;
  }

  // Heals and writes what the plan leaves, condensed layers as one SwiGLU each.
  void Remove(const SizeCandidate& candidate, const fs::path& folder, Made& made) {
    const CompressionPlan& plan = candidate.plan;
    const fs::path healed = work_ / fmt::format("healed-{}", made_);
    ApplyOptions options;
    Healing healing;
    if (candidate.condensed_layers() > 0) options.condensed_form = CondensedForm::kFused;
    if (!flags_.no_heal) {
      healing = Heal(session_, model_, plan, PrepareHeal(session_, model_, plan, sources_), healed);
      session_.FinishProgress();
      options.replacements = &healing.weights;
      options.refitted_layers = healing.condensed;
      options.changes = healing.card;
      made.healing = healing.json;
    }
    ApplyPlan(model_, plan, PlanRewrite(model_, plan, options), options, folder,
              session_.control());
    made.card_name = CardFileName(model_.checkpoint());
    fs::remove_all(healed);
  }

  void Quantize(const Model& source, Made& made) {
    QuantizingFlags flags;
    flags.size = flags_.size;
    Quantizing quantizing{.sources = fitting_, .method = {}};
    const QuantizePlan plan =
        PlanForSize(session_, source, UniformQuantizePlan(source, request_.experts, request_.rest),
                    request_.experts, flags, made.folder.string(), quantizing);
    QuantizeCalibrated(session_, source, plan, flags, made.folder.string(), quantizing);
    made.bits = CountFormats(plan);
    made.card_name = CardFileName(source.checkpoint());
  }

  void TryToMake(const SizeCandidate& candidate) {
    try {
      Take(candidate, Make(candidate));
    } catch (const UsageError& problem) {
      // The prediction of bytes knows nothing of how files are aligned.
      for (const char* name : {"candidate", "unpacked", "healed"}) {
        fs::remove_all(work_ / fmt::format("{}-{}", name, made_));
      }
      session_.Note(fmt::format("{}: {}", Describe(candidate), problem.what()));
    }
  }

  // Keeps a candidate if it is the best so far, and says what was measured.
  void Take(const SizeCandidate& candidate, Made made) {
    ++made_;
    const PairedDifference lost = Compare(intact_, made.judged);
    session_.Note(
        fmt::format("{}: predicted {:.4g}, measured nll {:+.4f} +- {} on {} judging tokens",
                    Describe(candidate), candidate.predicted(rounding_share_), lost.nll,
                    FormatStandardError(lost.standard_error),
                    FormatCount(static_cast<uint64_t>(made.judged.tokens))));
    OrderedJson json = {{"experts_left", candidate.experts_left},
                        {"condensed_layers", candidate.condensed_layers()},
                        {"predicted", candidate.predicted(rounding_share_)},
                        {"nll_difference", lost.nll}};
    if (lost.standard_error) json["standard_error"] = *lost.standard_error;
    measured_.push_back(json);
    if (KeepsAllExperts(candidate) && candidate.bits_cost > 0) {
      rounding_share_ = std::clamp(lost.nll / candidate.bits_cost, kLeastRoundingShare, 1.0);
    }
    const bool better = !best_ || made.judged.nll < best_->judged.nll;
    if (better && best_) fs::remove_all(best_->folder);
    if (!better) fs::remove_all(made.folder);
    if (!better) return;
    best_ = std::move(made);
    chosen_ = &candidate;
  }

  Session& session_;
  CompressFlags& flags_;
  const Model& model_;
  const std::vector<SourceBlocks>& sources_;
  std::vector<SourceBlocks> fitting_;
  std::vector<EvalText> judge_;
  fs::path work_;
  SizeRequest request_;
  Gathering gathering_;
  PerplexityResult intact_;
  std::vector<SizeCandidate> candidates_;
  size_t made_ = 0;
  double rounding_share_ = kUsualRoundingShare;
  std::optional<Made> best_;
  const SizeCandidate* chosen_ = nullptr;  // of candidates_
  OrderedJson measured_ = OrderedJson::array();
};

}  // namespace

bool SizesByAllMeans(const CompressFlags& flags) {
  return !flags.size.empty() && flags.keep == 0 && flags.active == 0 && !flags.progressive &&
         flags.budget == "uniform" && (flags.target.empty() || flags.target == "winnow");
}

void CheckSizingFlags(const CompressFlags& flags) {
  if (flags.means.empty() && flags.bits_of_rest.empty()) return;
  if (!SizesByAllMeans(flags)) {
    throw UsageError("--means and --bits-of-rest are of --size for Winnow alone",
                     "give --size and --target winnow, and neither --active nor --budget uneven");
  }
  if (!ParseMeans(flags.means).bits && !flags.bits_of_rest.empty()) {
    throw UsageError("--bits-of-rest does nothing without bits among --means",
                     "leave it out, or add bits");
  }
  RestFormat(flags);
}

int RunSizing(Session& session, CompressFlags& flags) {
  const fs::path work = flags.output + ".work";
  ClaimWorkFolder(work, session.flags, IsOfWork);
  // OUT may be what an interrupted --force was about to replace.
  if (session.flags.resume && fs::exists(work / kReplacesName)) session.flags.force = true;
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  const Model model = Model::Open(flags.model);
  const PerplexityProtocol protocol = FindProtocol(flags.protocol);
  std::vector<EvalText> texts;
  if (!flags.texts.empty()) {
    texts = LoadEvalTexts(model, flags.model, flags.texts, flags.calibration.blocks.field, protocol,
                          flags.max_tokens);
  }
  const std::vector<SourceBlocks> sources =
      LoadCalibration(session, model, flags.model, flags.calibration);
  Sizing sizing(session, flags, model, sources);
  sizing.Prepare();
  if (session.flags.dry_run) {
    sizing.PrintDryRun();
    return 0;
  }
  sizing.Gather();
  sizing.Choose();
  sizing.RequireIncrease();
  const TextMeasurements measured = sizing.Measure(texts, protocol);
  sizing.Publish();
  if (!flags.keep_stats) fs::remove_all(work);
  if (session.flags.json) {
    OrderedJson json = sizing.Json();
    if (!measured.rows.empty()) json["eval"] = EvalJson(measured.rows, flags.protocol);
    session.PrintJson(json);
    return 0;
  }
  session.Print(fmt::format("{}: {} -> {}", flags.output,
                            FormatBytes(model.checkpoint().total_bytes()), sizing.Summary()));
  session.Print(fmt::format("compressed in {}, peak memory {}", FormatSeconds(session.seconds()),
                            FormatBytes(PeakResidentBytes())));
  PrintMeasurements(session, measured, flags);
  return 0;
}

}  // namespace winnow::cli
