#include <fmt/format.h>

#include <algorithm>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "checkpoint/safetensors_writer.h"

namespace winnow {
namespace {

class Planner {
 public:
  Planner(const Model& model, const CompressionPlan& plan, const ApplyOptions& options)
      : model_(model),
        options_(options),
        kept_(KeptExperts(plan, model.config().num_layers())),
        betas_(SkipBetasOf(plan, model.config().num_layers())),
        target_(plan.target) {}

  RewritePlan Run() {
    RewritePlan out;
    const Checkpoint& checkpoint = model_.checkpoint();
    std::vector<const SafetensorsFile*> sources;
    for (const SafetensorsFile& shard : checkpoint.shards()) {
      out.bytes_before += shard.file().size();
      OutputShard output;
      for (const TensorInfo& tensor : shard.tensors()) {
        if (checkpoint.Find(tensor.name) == nullptr) continue;
        AddTensor(*checkpoint.Find(tensor.name), output);
      }
      if (output.tensors.empty()) continue;
      sources.push_back(&shard);
      out.shards.push_back(std::move(output));
    }
    NameShards(sources, out);
    for (size_t i = 0; i < out.shards.size(); ++i) {
      LayOut(out.shards[i], *sources[i]);
      out.bytes_after += out.shards[i].bytes;
    }
    WriteIndex(out);
    out.other_files = checkpoint.OtherFiles();
    for (const LayerConfig& layer : model_.config().layers) {
      if (layer.is_moe) out.experts_before += layer.num_experts;  // no router, nothing to choose
    }
    for (const std::vector<int32_t>& kept : kept_) {
      out.experts_after += static_cast<int64_t>(kept.size());
    }
    WriteConfig(out);
    return out;
  }

 private:
  void AddTensor(const TensorInfo& tensor, OutputShard& shard) {
    const TensorRole role = model_.RoleOf(tensor.name);
    OutputTensor output;
    output.info.name = tensor.name;
    output.info.shape = tensor.shape;
    output.source_dtype = tensor.dtype;
    output.info.dtype =
        options_.dtype && IsComputeDtype(tensor.dtype) ? *options_.dtype : tensor.dtype;
    if (role.kind == TensorKind::kOther) {
      AddRange(tensor, 0, tensor.bytes, output);
    } else {
      const std::vector<int32_t>& kept = kept_[static_cast<size_t>(role.layer)];
      if (role.kind == TensorKind::kExpert) {
        const auto at = std::lower_bound(kept.begin(), kept.end(), role.expert);
        if (at == kept.end() || *at != role.expert) return;  // dropped
        output.info.name =
            model_.RenameExpert(tensor.name, role.expert, static_cast<int32_t>(at - kept.begin()));
        AddRange(tensor, 0, tensor.bytes, output);
      } else {
        const uint64_t slice = tensor.bytes / tensor.shape[0];
        for (const int32_t expert : kept) {
          AddRange(tensor, static_cast<uint64_t>(expert) * slice, slice, output);
        }
        output.info.shape[0] = kept.size();
      }
    }
    shard.tensors.push_back(std::move(output));
  }

  // A part of a tensor behind what `output` has, with whatever replaces some of it.
  void AddRange(const TensorInfo& tensor, uint64_t offset, uint64_t bytes,
                OutputTensor& output) const {
    for (const uint64_t limit = offset + bytes; offset < limit;) {
      uint64_t end = limit;
      SourceRange range{.tensor = &tensor, .offset = offset};
      if (options_.replacements != nullptr) {
        range.replacement = options_.replacements->Find(tensor, offset, limit, end);
      }
      range.bytes = end - offset;
      if (range.replacement != nullptr) {
        const uint64_t stored = DtypeBits(tensor.dtype), there = DtypeBits(range.dtype());
        range.skip = (offset - range.replacement->source_offset) * there / stored;
        range.bytes = range.bytes * there / stored;
      }
      const bool follows = !output.ranges.empty() && range.replacement == nullptr &&
                           output.ranges.back().replacement == nullptr &&
                           output.ranges.back().offset + output.ranges.back().bytes == offset;
      if (follows) {
        output.ranges.back().bytes += range.bytes;
      } else {
        output.ranges.push_back(range);
      }
      offset = end;
    }
  }

  // Names are kept; if a shard lost all its tensors the others are numbered anew.
  void NameShards(const std::vector<const SafetensorsFile*>& sources, RewritePlan& out) const {
    const bool all = sources.size() == model_.checkpoint().shards().size();
    for (size_t i = 0; i < out.shards.size(); ++i) {
      out.shards[i].file_name =
          all ? sources[i]->path().filename().string()
              : fmt::format("model-{:05d}-of-{:05d}.safetensors", i + 1, out.shards.size());
    }
  }

  static void LayOut(OutputShard& shard, const SafetensorsFile& source) {
    std::map<std::string, std::string> metadata = source.metadata();
    metadata.try_emplace("format", "pt");  // some loaders refuse files without it
    std::vector<TensorInfo> infos;
    for (const OutputTensor& tensor : shard.tensors) infos.push_back(tensor.info);
    // Data begin behind the header and its length. Small files stay as small as they can be.
    constexpr uint64_t kLargeBytes = uint64_t{64} << 20;
    std::optional<uint64_t> like_source;
    if (source.file().size() >= kLargeBytes) like_source = source.header().size() + 8;
    shard.header = LayOutSafetensors(infos, metadata, like_source);
    shard.bytes = shard.header.size();
    for (size_t i = 0; i < infos.size(); ++i) {
      shard.tensors[i].info = infos[i];
      shard.bytes += infos[i].bytes;
    }
  }

  void WriteIndex(RewritePlan& out) const {
    if (!model_.checkpoint().has_index() && out.shards.size() == 1) return;
    uint64_t total = 0;
    Json map = Json::object();
    for (const OutputShard& shard : out.shards) {
      for (const OutputTensor& tensor : shard.tensors) {
        total += tensor.info.bytes;
        map[tensor.info.name] = shard.file_name;
      }
    }
    const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
    out.index_json = index.dump(2) + "\n";
  }

  void WriteConfig(RewritePlan& out) const {
    OrderedJson config = model_.checkpoint().config();
    std::vector<int64_t> experts(kept_.size());
    bool uneven = false;
    const std::vector<int32_t> moe = model_.config().MoeLayers();
    for (const int32_t layer : moe) {
      const auto at = static_cast<size_t>(layer);
      experts[at] = std::ssize(kept_[at]);
      uneven = uneven || experts[at] != experts[static_cast<size_t>(moe.front())];
    }
    if (uneven && target_ != "winnow") {
      throw UsageError("the plan keeps different numbers of experts in different layers",
                       "config.json has one number for all layers; keep the same in each, or set "
                       "the plan's target to winnow alone");
    }
    const Family& family = *model_.config().family;
    if (uneven) {
      config = ConfigWithExpertsPerLayer(config, family, experts);
    } else if (!moe.empty()) {
      config = ConfigWithExperts(config, family, experts[static_cast<size_t>(moe.front())]);
    }
    // Thresholds hold among the experts they were measured among.
    const bool pruned = out.experts_after < out.experts_before;
    if (!betas_.empty() || pruned) config = ConfigWithBetas(config, betas_);
    if (options_.dtype) {
      const char* name = *options_.dtype == Dtype::kF32    ? "float32"
                         : *options_.dtype == Dtype::kBF16 ? "bfloat16"
                                                           : "float16";
      config[config.contains("dtype") ? "dtype" : "torch_dtype"] = name;
    }
    out.config_json = config.dump(2) + "\n";
  }

  const Model& model_;
  const ApplyOptions& options_;
  std::vector<std::vector<int32_t>> kept_;
  std::vector<double> betas_;
  std::string target_;
};

}  // namespace

RewritePlan PlanRewrite(const Model& model, const CompressionPlan& plan,
                        const ApplyOptions& options) {
  CheckPlan(plan, model);
  return Planner(model, plan, options).Run();
}

}  // namespace winnow
