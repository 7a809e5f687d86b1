#include "train/train_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/hash.h"
#include "base/json.h"
#include "checkpoint/safetensors_file.h"
#include "checkpoint/safetensors_writer.h"

namespace winnow {
namespace {

constexpr char kState[] = "state.safetensors";
constexpr char kBest[] = "best.safetensors";
constexpr char kWeights[] = "tuned.safetensors";
constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;  // PyTorch's defaults

using Clock = std::chrono::steady_clock;

class Trainer {
 public:
  Trainer(const Model& model, const TrainRows& rows, const TrainOptions& options,
          const TrainPlan& plan, const fs::path& folder, ThreadPool& pool,
          const JobControl& control, const std::function<void(const StepRecord&)>& on_step)
      : model_(model),
        rows_(rows),
        options_(options),
        folder_(folder),
        control_(control),
        on_step_(on_step),
        store_(model, options.parameters,
               {.spill = plan.spill_state ? folder / "optimizer.spill" : fs::path{},
                .pure_bf16 = options.pure_bf16,
                .dtype = options.dtype},
               pool),
        pass_(model, store_, PassOptionsOf(options, plan, folder), pool, control) {}

  TrainResult Run() {
    const bool resumed = LoadState();
    for (const StepRecord& record : result_.steps) on_step_(record);
    if (!resumed && !rows_.held_out.empty()) {
      result_.held_out_before = HeldOut();
      best_ = *result_.held_out_before;
      SaveBest();
    }
    last_save_ = Clock::now();
    try {
      while (next_step() < std::ssize(rows_.steps) && !result_.stopped_early) {
        RunStep();
        const double since = std::chrono::duration<double>(Clock::now() - last_save_).count();
        if (since >= options_.checkpoint_seconds) SaveState();
      }
    } catch (const InterruptedError&) {
      // Weights change between passes alone, so they are those after the last whole step.
      SaveState();
      throw;
    }
    if (!rows_.held_out.empty()) {
      if (!result_.steps.empty() && !result_.steps.back().held_out) {
        result_.steps.back().held_out = HeldOut();
        Judge(*result_.steps.back().held_out);
      }
      result_.held_out_after =
          result_.steps.empty() ? result_.held_out_before : result_.steps.back().held_out;
    }
    SaveState();
    if (options_.patience > 0 && result_.best_step != next_step() - 1) {
      LoadArrays(folder_ / kBest, {{ParameterStore::kMaster, "master"}});
      result_.held_out_after = best_;
    } else {
      result_.best_step = -1;
    }
    WriteWeights();
    return std::move(result_);
  }

 private:
  static PassOptions PassOptionsOf(const TrainOptions& options, const TrainPlan& plan,
                                   const fs::path& folder) {
    PassOptions pass = options.pass;
    pass.resident = plan.resident;
    pass.prefetch = plan.prefetch;
    pass.keep_tapes = plan.keep_tapes;
    if (plan.spill_streams) pass.spill_folder = folder;
    return pass;
  }

  int64_t next_step() const { return std::ssize(result_.steps); }

  void RunStep() {
    const auto start = Clock::now();
    const int64_t step = next_step();
    const TrainBatch batch = MakeBatch(rows_.rows, rows_.steps[static_cast<size_t>(step)]);
    const PassResult pass = pass_.Run(batch, true);
    StepRecord record;
    record.step = step;
    record.lr = LearningRate(options_.schedule, step);
    record.loss = pass.loss;
    record.gradient_norm = store_.GradientNorm();
    if (!std::isfinite(record.gradient_norm)) {
      throw ModelError(fmt::format("step {}: the gradient is not finite", step),
                       "a smaller --lr may help");
    }
    const auto t = static_cast<double>(step + 1);
    AdamWFactors factors;
    if (options_.clip > 0) {
      factors.gradient_scale =
          static_cast<float>(std::min(1.0, options_.clip / (record.gradient_norm + 1e-6)));
    }
    factors.decay = static_cast<float>(1 - record.lr * options_.weight_decay);
    factors.beta2 = static_cast<float>(kBeta2);
    factors.rest1 = static_cast<float>(1 - kBeta1);
    factors.rest2 = static_cast<float>(1 - kBeta2);
    factors.step_size = static_cast<float>(record.lr / (1 - std::pow(kBeta1, t)));
    factors.root_bias2 = static_cast<float>(std::sqrt(1 - std::pow(kBeta2, t)));
    factors.epsilon = static_cast<float>(kEpsilon);
    store_.Step(factors);
    result_.tokens += batch.num_tokens();
    result_.seconds += std::chrono::duration<double>(Clock::now() - start).count();
    result_.steps.push_back(record);
    if (!rows_.held_out.empty() && options_.eval_every > 0 &&
        (step + 1) % options_.eval_every == 0) {
      // An interruption in here leaves the step without its score, which resuming makes up for.
      result_.steps.pop_back();
      pending_ = record;
      record.held_out = HeldOut();
      result_.steps.push_back(record);
      pending_.reset();
      Judge(*record.held_out);
    }
    on_step_(record);
    Report(record);
  }

  void Judge(double held_out) {
    if (held_out < best_) {
      best_ = held_out;
      result_.best_step = next_step() - 1;
      worse_ = 0;
      SaveBest();
      return;
    }
    ++worse_;
    result_.stopped_early = options_.patience > 0 && worse_ >= options_.patience;
  }

  double HeldOut() {
    const auto rows = static_cast<size_t>(std::ssize(rows_.steps.front()));
    double total = 0, weight = 0;
    for (size_t first = 0; first < rows_.held_out.size(); first += rows) {
      const auto numbers =
          std::span(rows_.held_out).subspan(first, std::min(rows, rows_.held_out.size() - first));
      const PassResult pass = pass_.Run(MakeBatch(rows_.rows, numbers), false);
      total += pass.loss * pass.weight;
      weight += pass.weight;
    }
    return total / weight;
  }

  void Report(const StepRecord& record) {
    if (work_total_ == 0) {
      for (const auto& step : rows_.steps) {
        for (const int32_t row : step) {
          work_total_ += std::ssize(rows_.rows[static_cast<size_t>(row)].ids);
        }
      }
    }
    work_done_ = 0;
    for (int64_t s = 0; s < next_step(); ++s) {
      for (const int32_t row : rows_.steps[static_cast<size_t>(s)]) {
        work_done_ += std::ssize(rows_.rows[static_cast<size_t>(row)].ids);
      }
    }
    control_.Report({.stage = "finetune",
                     .layer = record.step,
                     .work_done = work_done_,
                     .work_total = work_total_,
                     .note = fmt::format("step {}/{}  loss {:.4f}", record.step + 1,
                                         rows_.steps.size(), record.loss)});
  }

  // What decides the result: a saved state of anything else is refused.
  std::string RunFingerprint() const {
    Fingerprint fingerprint;
    fingerprint.Add(model_.checkpoint().FingerprintHex());
    for (const TrainRow& row : rows_.rows) {
      fingerprint.Add(std::as_bytes(std::span(row.ids)));
      fingerprint.Add(std::as_bytes(std::span(row.weights)));
      fingerprint.Add(std::as_bytes(std::span(row.mask)));
      fingerprint.Add(uint64_t{row.ids.size()});
    }
    for (const std::vector<int32_t>& step : rows_.steps) {
      fingerprint.Add(std::as_bytes(std::span(step)));
      fingerprint.Add(uint64_t{step.size()});
    }
    fingerprint.Add(std::as_bytes(std::span(rows_.held_out)));
    for (const Parameter& p : options_.parameters) fingerprint.Add(p.Name());
    const PassOptions& pass = options_.pass;
    if (pass.teacher != nullptr) fingerprint.Add(pass.teacher->checkpoint().FingerprintHex());
    const Schedule& s = options_.schedule;
    fingerprint.Add(fmt::format(
        "{} {} {} {} {} {} {} {} {} {} {} {} {} {} {} {} {}", static_cast<int>(s.shape), s.peak,
        s.warmup_share, s.least_share, s.total_steps, options_.weight_decay, options_.clip,
        options_.pure_bf16, options_.dtype ? DtypeName(*options_.dtype) : "as stored",
        options_.eval_every, options_.patience, static_cast<int>(pass.compute), pass.micro_batch,
        pass.balance_alpha, pass.balance_by_row, static_cast<int>(pass.distill),
        pass.distill_weight));
    return fingerprint.Hex();
  }

  using Arrays = std::vector<std::pair<ParameterStore::Array, const char*>>;

  void SaveArrays(const fs::path& path, const Arrays& arrays, const std::string& progress) {
    std::vector<TensorInfo> infos;
    for (const auto& [array, name] : arrays) {
      TensorInfo info;
      info.name = name;
      info.dtype = Dtype::kF32;
      info.shape = {store_.count()};
      infos.push_back(std::move(info));
    }
    const std::string header = LayOutSafetensors(infos, {{"progress", progress}});
    const fs::path temporary = path.string() + ".tmp";
    {
      const File out = File::Create(temporary);
      out.WriteAt(0, std::as_bytes(std::span(header)));
      for (size_t i = 0; i < arrays.size(); ++i) {
        store_.ForPieces(
            arrays[i].first,
            [&](uint64_t first, std::span<float> values) {
              out.WriteAt(infos[i].file_offset + first * sizeof(float), std::as_bytes(values));
            },
            false);
      }
      out.Sync();
    }
    RenameDurably(temporary, path);
  }

  std::string LoadArrays(const fs::path& path, const Arrays& arrays) {
    const SafetensorsFile file = SafetensorsFile::Open(path);
    for (const auto& [array, name] : arrays) {
      const TensorInfo& tensor = file.Get(name);
      if (tensor.dtype != Dtype::kF32 || tensor.bytes != store_.count() * sizeof(float)) {
        throw ModelError(fmt::format("{}: tensor {} is {}", path.string(), name, tensor.Describe()),
                         "the unfinished run is damaged; start again with --force");
      }
      store_.ForPieces(
          array,
          [&](uint64_t first, std::span<float> values) {
            file.ReadPart(tensor, first * sizeof(float), std::as_writable_bytes(values));
          },
          true);
    }
    const auto progress = file.metadata().find("progress");
    return progress == file.metadata().end() ? std::string() : progress->second;
  }

  void SaveBest() {
    if (options_.patience > 0) {
      SaveArrays(folder_ / kBest, {{ParameterStore::kMaster, "master"}}, "");
    }
  }

  static Arrays StateArrays() {
    return {{ParameterStore::kMaster, "master"},
            {ParameterStore::kMoment1, "moment1"},
            {ParameterStore::kMoment2, "moment2"}};
  }

  void SaveState() {
    if (pending_) result_.steps.push_back(*pending_);
    OrderedJson steps = OrderedJson::array();
    for (const StepRecord& record : result_.steps) {
      OrderedJson step = {record.lr, record.loss, record.gradient_norm};
      if (record.held_out) step.push_back(*record.held_out);
      steps.push_back(std::move(step));
    }
    OrderedJson json = {{"fingerprint", RunFingerprint()},        {"best", best_},
                        {"best_step", result_.best_step},         {"worse", worse_},
                        {"stopped_early", result_.stopped_early}, {"steps", std::move(steps)}};
    if (result_.held_out_before) json["held_out_before"] = *result_.held_out_before;
    SaveArrays(folder_ / kState, StateArrays(), json.dump());
    last_save_ = Clock::now();
  }

  bool LoadState() {
    const fs::path path = folder_ / kState;
    if (!options_.resume || !fs::exists(path)) return false;
    const auto wrong = [&] {
      return UsageError(
          fmt::format("{} was made with another model, data or flag", folder_.string()),
          "repeat the command as it was, or start again with --force");
    };
    {
      const SafetensorsFile file = SafetensorsFile::Open(path);
      const auto progress = file.metadata().find("progress");
      if (progress == file.metadata().end()) throw wrong();
      const Json json = ParseJson(progress->second, path.string());
      if (json.value("fingerprint", "") != RunFingerprint()) throw wrong();
      best_ = json["best"].is_number() ? json["best"].get<double>() : kInfinity;
      result_.best_step = json.at("best_step").get<int64_t>();
      worse_ = json.at("worse").get<int64_t>();
      result_.stopped_early = json.at("stopped_early").get<bool>();
      if (json.contains("held_out_before")) {
        result_.held_out_before = json["held_out_before"].get<double>();
      }
      for (const Json& step : json.at("steps")) {
        StepRecord record;
        record.step = next_step();
        record.lr = step.at(0).get<double>();
        record.loss = step.at(1).get<double>();
        record.gradient_norm = step.at(2).get<double>();
        if (step.size() > 3) record.held_out = step.at(3).get<double>();
        result_.steps.push_back(record);
      }
    }
    LoadArrays(path, StateArrays());
    // A score that an interruption prevented.
    if (next_step() > 0 && !rows_.held_out.empty() && options_.eval_every > 0 &&
        next_step() % options_.eval_every == 0 && !result_.steps.back().held_out) {
      result_.steps.back().held_out = HeldOut();
      Judge(*result_.steps.back().held_out);
    }
    return true;
  }

  void WriteWeights() {
    std::vector<TensorInfo> infos;
    for (const Parameter& p : store_.parameters()) {
      TensorInfo info;
      info.name = p.Name();
      info.dtype = store_.DtypeOf(p);
      info.shape = {static_cast<uint64_t>(p.slice.rows), static_cast<uint64_t>(p.slice.cols)};
      infos.push_back(std::move(info));
    }
    const std::string header = LayOutSafetensors(infos, {});
    result_.weights = folder_ / kWeights;
    const File out = File::Create(result_.weights);
    out.WriteAt(0, std::as_bytes(std::span(header)));
    size_t at = 0;
    std::vector<std::byte> stored;
    store_.ForPieces(
        ParameterStore::kMaster,
        [&](uint64_t first, std::span<float> values) {
          while (!values.empty()) {
            while (store_.parameters()[at].offset + store_.parameters()[at].count <= first) ++at;
            const Parameter& p = store_.parameters()[at];
            const Dtype dtype = infos[at].dtype;
            const uint64_t count = std::min<uint64_t>(values.size(), p.offset + p.count - first);
            stored.resize(count * DtypeBits(dtype) / 8);
            for (uint64_t i = 0; i < count; ++i) StoreFloat(dtype, values[i], stored.data(), i);
            out.WriteAt(infos[at].file_offset + (first - p.offset) * (DtypeBits(dtype) / 8),
                        stored);
            values = values.subspan(count);
            first += count;
          }
        },
        false);
    out.Sync();
  }

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Model& model_;
  const TrainRows& rows_;
  const TrainOptions& options_;
  fs::path folder_;
  const JobControl& control_;
  const std::function<void(const StepRecord&)>& on_step_;
  ParameterStore store_;
  BatchPass pass_;
  TrainResult result_;
  std::optional<StepRecord> pending_;  // taken, but not yet scored
  double best_ = kInfinity;
  int64_t worse_ = 0;  // scores since the best
  int64_t work_done_ = 0, work_total_ = 0;
  Clock::time_point last_save_;
};

}  // namespace

TrainResult RunTrain(const Model& model, const TrainRows& rows, const TrainOptions& options,
                     const TrainPlan& plan, const fs::path& folder, ThreadPool& pool,
                     const JobControl& control,
                     const std::function<void(const StepRecord&)>& on_step) {
  if (!options.resume) fs::remove_all(folder);
  RequireDiskSpace(folder, plan.bytes_to_write, "the optimiser's state");
  fs::create_directories(folder);
  return Trainer(model, rows, options, plan, folder, pool, control, on_step).Run();
}

WeightReplacements TrainedWeights(const std::vector<Parameter>& parameters, const fs::path& file) {
  WeightReplacements weights;
  const auto opened = std::make_shared<const SafetensorsFile>(SafetensorsFile::Open(file));
  for (const Parameter& p : parameters) weights.Add(p.slice, opened, p.Name());
  return weights;
}

}  // namespace winnow
