#include "doctor/health.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "base/memory.h"
#include "base/units.h"
#include "checkpoint/safetensors_file.h"
#include "kernels/targets.h"
#include "model/model.h"
#include "model/weight_parts.h"
#include "observe/layer_stats.h"
#include "plan/compression_plan.h"
#include "plan/loader_target.h"
#include "tokenizer/tokenizer.h"

namespace winnow {
namespace {

constexpr uint64_t kScanBytes = uint64_t{4} << 20;

struct ValueCounts {
  uint64_t nan = 0, inf = 0, zero = 0, total = 0;
};

ValueCounts CountValues(const SafetensorsFile& file, const TensorInfo& tensor, ThreadPool& pool) {
  ValueCounts counts;
  const uint64_t size = DtypeBits(tensor.dtype) / 8;
  AlignedBuffer<std::byte> buffer(static_cast<size_t>(std::min(kScanBytes, tensor.bytes)));
  std::vector<ValueCounts> parts(static_cast<size_t>(pool.num_threads()));
  for (uint64_t done = 0; done < tensor.bytes;) {
    const uint64_t bytes = std::min<uint64_t>(kScanBytes, tensor.bytes - done);
    file.ReadPart(tensor, done, buffer.span().first(bytes));
    const uint64_t elements = bytes / size;
    constexpr uint64_t kPart = 65536;
    pool.Run(static_cast<int64_t>((elements + kPart - 1) / kPart), [&](int64_t task, int worker) {
      ValueCounts& part = parts[static_cast<size_t>(worker)];
      const uint64_t end = std::min(elements, (static_cast<uint64_t>(task) + 1) * kPart);
      for (uint64_t i = static_cast<uint64_t>(task) * kPart; i < end; ++i) {
        const float value = LoadAsFloat(tensor.dtype, buffer.data(), i);
        part.nan += std::isnan(value) ? 1 : 0;
        part.inf += std::isinf(value) ? 1 : 0;
        part.zero += value == 0.0f ? 1 : 0;
      }
    });
    counts.total += elements;
    done += bytes;
  }
  for (const ValueCounts& part : parts) {
    counts.nan += part.nan;
    counts.inf += part.inf;
    counts.zero += part.zero;
  }
  return counts;
}

void ScanFile(const SafetensorsFile& file, ThreadPool& pool, const JobControl& control,
              HealthReport& report) {
  uint64_t done = 0;
  for (const TensorInfo& tensor : file.tensors()) {
    control.Poll();
    if (IsComputeDtype(tensor.dtype) && tensor.bytes > 0) {
      const ValueCounts counts = CountValues(file, tensor, pool);
      if (counts.nan > 0) {
        report.findings.push_back(
            fmt::format("{}: {} of {} values are NaN", tensor.name, counts.nan, counts.total));
      }
      if (counts.inf > 0) {
        report.findings.push_back(
            fmt::format("{}: {} of {} values are Inf", tensor.name, counts.inf, counts.total));
      }
      if (counts.zero == counts.total && !tensor.name.ends_with(".bias")) {
        report.findings.push_back(fmt::format("{}: all values are zero", tensor.name));
      }
    }
    done += tensor.bytes;
    control.Report({.stage = "doctor",
                    .work_done = static_cast<int64_t>(done),
                    .work_total = static_cast<int64_t>(file.file().size()),
                    .bytes = true});
  }
}

// Scales (and minima) of packed matrices: f16, which no weight of a sound model makes infinite.
// Codes mean something whatever they are.
void ScanPacked(const Model& model, const TensorSlice& slice, HealthReport& report) {
  if (slice.packed.empty()) return;
  const uint64_t block_bytes = PackedBlockBytes(slice.packed, slice.cols);
  const uint64_t scale_bytes = PackedCodesOffset(slice.packed, slice.cols);
  std::vector<std::byte> scales(static_cast<size_t>(scale_bytes));
  uint64_t bad = 0, nonzero = 0;
  for (uint64_t at = 0; at < slice.bytes(); at += block_bytes) {
    model.checkpoint().ReadPart(*slice.tensor, slice.offset_bytes + at, scales);
    for (size_t i = 0; i < scales.size() / 2; ++i) {
      const float value = LoadAsFloat(Dtype::kF16, scales.data(), i);
      bad += std::isfinite(value) ? 0 : 1;
      nonzero += value == 0.0f ? 0 : 1;
    }
  }
  const std::string where =
      fmt::format("{} ({} [{}, {}] at byte {})", slice.tensor->name, PackedFormatName(slice.packed),
                  slice.rows, slice.cols, slice.offset_bytes);
  if (bad > 0) {
    report.findings.push_back(fmt::format("{}: {} scales are NaN or infinite", where, bad));
  }
  if (nonzero == 0) report.findings.push_back(fmt::format("{}: all scales are zero", where));
}

void ScanPackedLayers(const Model& model, const JobControl& control, HealthReport& report) {
  const auto scan_mlp = [&](const FeedForwardSlices& part) {
    for (const TensorSlice* slice : {&part.gate, &part.up, &part.down}) {
      control.Poll();
      ScanPacked(model, *slice, report);
    }
  };
  for (const LayerSlices& layer : model.layers()) {
    for (const TensorSlice* slice : {&layer.q, &layer.k, &layer.v, &layer.o}) {
      ScanPacked(model, *slice, report);
    }
    for (const FeedForwardSlices& expert : layer.experts) scan_mlp(expert);
    scan_mlp(layer.shared);
    scan_mlp(layer.dense);
  }
  ScanPacked(model, model.lm_head(), report);
}

// A router row of zeros gives its expert the same logit for every token; equal rows tie.
void CheckRouters(const Model& model, HealthReport& report) {
  for (const int32_t layer : model.config().MoeLayers()) {
    const TensorSlice& router = model.layers()[static_cast<size_t>(layer)].router;
    std::vector<std::byte> bytes(router.bytes());
    model.checkpoint().ReadPart(*router.tensor, router.offset_bytes, bytes);
    std::vector<std::vector<float>> rows;
    for (int64_t e = 0; e < router.rows; ++e) {
      std::vector<float>& row = rows.emplace_back();
      for (int64_t i = 0; i < router.cols; ++i) {
        row.push_back(LoadAsFloat(router.tensor->dtype, bytes.data(),
                                  static_cast<size_t>(e * router.cols + i)));
      }
    }
    for (size_t e = 0; e < rows.size(); ++e) {
      if (std::all_of(rows[e].begin(), rows[e].end(), [](float v) { return v == 0.0f; })) {
        report.findings.push_back(
            fmt::format("{}: router row {} is dead (all zeros)", router.tensor->name, e));
        continue;
      }
      for (size_t other = 0; other < e; ++other) {
        if (rows[e] == rows[other]) {
          report.findings.push_back(
              fmt::format("{}: router rows {} and {} are equal", router.tensor->name, other, e));
        }
      }
    }
  }
}

void CheckTokenizer(const fs::path& path, const Model* model, HealthReport& report) {
  const Tokenizer tokenizer = Tokenizer::Load(path);
  report.facts.push_back(fmt::format("tokenizer: {} ids, {} BOS", tokenizer.vocab_size(),
                                     tokenizer.adds_bos() ? "adds" : "adds no"));
  if (model == nullptr) return;
  const int64_t rows = model->config().vocab_size;
  if (tokenizer.vocab_size() > rows) {
    throw ModelError(fmt::format("{}: token id {} has no embedding, the model has {} rows",
                                 path.string(), tokenizer.vocab_size() - 1, rows),
                     "the tokenizer is of another model; fetch both from the same revision");
  }
  if (tokenizer.vocab_size() < rows) {
    report.facts.push_back(
        fmt::format("{} embedding rows have no token (padding)", rows - tokenizer.vocab_size()));
  }
}

void CheckModelFolder(const fs::path& path, bool scan_weights, ThreadPool& pool,
                      const JobControl& control, HealthReport& report) {
  const Model model = Model::Open(path);
  const ModelConfig& config = model.config();
  report.subject = "model";
  int64_t most_experts = 0;
  for (const LayerConfig& layer : config.layers) {
    most_experts = std::max(most_experts, layer.num_experts);
  }
  report.facts.push_back(fmt::format(
      "{}: {} layers ({} MoE), {} experts, {} per token, {} in {} file(s)",
      config.family->model_type, config.num_layers(), config.MoeLayers().size(), most_experts,
      config.num_experts_per_tok, FormatBytes(model.checkpoint().total_bytes()),
      model.checkpoint().shards().size()));
  if (config.is_packed()) {
    std::string parts;
    for (const WeightPart& part : WeightParts(model)) {
      parts += fmt::format("{}{} {} ({:.2f} bits per weight)", parts.empty() ? "" : ", ", part.part,
                           part.format, part.bits_per_weight());
    }
    report.facts.push_back("packed: " + parts);
  }
  report.findings = model.findings();
  if (fs::exists(path / "tokenizer.json")) {
    CheckTokenizer(path, &model, report);
  } else {
    report.facts.push_back("no tokenizer.json: token ids work, text does not");
  }
  CheckRouters(model, report);
  if (!scan_weights) return;
  for (const SafetensorsFile& shard : model.checkpoint().shards()) {
    ScanFile(shard, pool, control, report);
  }
  ScanPackedLayers(model, control, report);
}

// Plans say so in `schema`; config.json and its like have none.
bool LooksLikePlan(const fs::path& path) {
  const Json json = ParseJson(ReadTextFile(path), path.string());
  return !json.is_object() || json.contains("schema") || json.contains("layers");
}

}  // namespace

HealthReport CheckPath(const fs::path& path, bool scan_weights, ThreadPool& pool,
                       const JobControl& control) {
  HealthReport report;
  if (!fs::exists(path)) {
    throw ModelError(fmt::format("{} does not exist", path.string()), "check the path");
  }
  if (fs::is_directory(path)) {
    if (fs::exists(path / "stats.json")) {
      const StatsInfo info = ReadStatsInfo(path);
      for (const StatsLayer& layer : info.layers) LayerStatsReader(path, info, layer);
      report.subject = "statistics";
      report.facts.push_back(fmt::format("{} tokens, {} layers, level {}",
                                         FormatCount(static_cast<uint64_t>(info.num_tokens())),
                                         info.layers.size(), StatsLevelName(info.level)));
    } else if (!fs::exists(path / "config.json") && fs::exists(path / "tokenizer.json")) {
      report.subject = "tokenizer";
      CheckTokenizer(path, nullptr, report);
    } else {
      CheckModelFolder(path, scan_weights, pool, control, report);
    }
    return report;
  }
  const std::string name = path.filename().string();
  if (name.ends_with(".safetensors")) {
    report.subject = "safetensors file";
    const SafetensorsFile file = SafetensorsFile::Open(path);
    report.facts.push_back(
        fmt::format("{} tensors, {}", file.tensors().size(), FormatBytes(file.file().size())));
    if (scan_weights) ScanFile(file, pool, control, report);
  } else if (name == "tokenizer.json" || name == "tokenizer_config.json") {
    report.subject = "tokenizer";
    CheckTokenizer(path, nullptr, report);
  } else if (name.ends_with(".json")) {
    report.subject = "plan";
    if (!LooksLikePlan(path)) {
      throw ModelError(
          fmt::format("{}: not a plan, and doctor knows no other .json by itself", path.string()),
          "give the folder it belongs to");
    }
    const CompressionPlan plan = ReadPlan(path);
    if (!plan.target.empty()) CheckTarget(plan, plan.target);
    report.facts.push_back(fmt::format("{} layers, method {}", plan.layers.size(), plan.method));
  } else {
    throw UsageError(
        fmt::format("{}: not a kind of file that doctor knows", path.string()),
        "give a model folder, a .safetensors file, a tokenizer.json, a plan or statistics");
  }
  return report;
}

HealthReport CheckMachine(const fs::path& working_folder) {
  HealthReport report;
  report.subject = "machine";
  report.facts.push_back(fmt::format("instruction sets: {} (kernels use {})",
                                     fmt::join(SupportedIsas(), ", "), ActiveIsa()));
  report.facts.push_back(fmt::format("threads: {}", AvailableCpus()));
  report.facts.push_back(fmt::format("memory: {} available, default budget {}",
                                     FormatBytes(AvailableMemoryBytes()),
                                     FormatBytes(DefaultMemoryBudget())));
  report.facts.push_back(
      fmt::format("disk: {} free here", FormatBytes(FreeDiskBytes(working_folder))));
  if (ActiveIsa() == "scalar") {
    report.findings.push_back("this CPU has no AVX2: everything works, slowly");
  }
  return report;
}

}  // namespace winnow
