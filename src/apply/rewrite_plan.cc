#include <fmt/format.h>

#include <algorithm>

#include "apply/checkpoint_rewriter.h"
#include "apply/condensed_layer.h"
#include "apply/export_code.h"
#include "base/error.h"
#include "checkpoint/safetensors_writer.h"
#include "model/quantization_config.h"

namespace winnow {
namespace {

class Planner {
 public:
  Planner(const Model& model, const CompressionPlan& plan, const ApplyOptions& options)
      : model_(model),
        options_(options),
        kept_(KeptExperts(plan, model.config().num_layers())),
        betas_(SkipBetasOf(plan, model.config().num_layers())),
        target_(plan.target) {
    if (model.config().is_packed()) CheckPacked(plan);
    if (options.condensed_form == CondensedForm::kStock) stock_width_ = StockWidth(model, plan);
    for (const LayerPlan& layer : plan.layers) {
      if (!layer.condensed) continue;
      Condensed condensed{&layer, FormOf(layer, options.condensed_form, IsRefitted(layer.layer))};
      for (const std::string& name : AbsorbedTensors(model, layer, condensed.form)) {
        absorbed_[name] = layer.layer;
      }
      condensed_.emplace(layer.layer, std::move(condensed));
    }
  }

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
    for (const auto& [layer, condensed] : condensed_) {
      out.experts_after += std::ssize(condensed.plan->kept);
    }
    WriteConfig(out);
    out.stock_width = stock_width_;
    for (const auto& [layer, condensed] : condensed_) {
      out.condensed_layers.push_back(layer);
      uint64_t bytes = 0;
      for (const TensorInfo& tensor : CondensedTensors(model_, *condensed.plan, condensed.form,
                                                       options_.dtype, stock_width_)) {
        bytes += tensor.bytes;
      }
      out.largest_built_bytes = std::max(out.largest_built_bytes, bytes);
      const LayerSlices& slices = model_.layers()[static_cast<size_t>(layer)];
      const auto kept = std::max<uint64_t>(condensed.plan->kept.size(), 1);
      out.largest_build_source_bytes =
          std::max(out.largest_build_source_bytes,
                   slices.CommonBytes() + slices.ExpertBytes() / slices.experts.size() * kept);
    }
    return out;
  }

 private:
  struct Condensed {
    const LayerPlan* plan = nullptr;
    CondensedForm form = CondensedForm::kParts;
    bool placed = false;
  };

  void CheckPacked(const CompressionPlan& plan) const {
    if (plan.condenses()) {
      throw UsageError("the model is packed, and condensed layers are built of its weights",
                       "condense the original model, quantise last");
    }
    if (options_.export_code) {
      throw UsageError("--export-code: transformers cannot read packed weights",
                       "leave it out, or export the model as it was before it was quantised");
    }
  }

  bool IsRefitted(int32_t layer) const { return options_.refitted_layers.contains(layer); }

  // Where the first tensor of a condensed layer's experts was, all that it becomes.
  void PlaceCondensed(Condensed& condensed, OutputShard& shard) const {
    if (condensed.placed) return;
    condensed.placed = true;
    for (TensorInfo& info :
         CondensedTensors(model_, *condensed.plan, condensed.form, options_.dtype, stock_width_)) {
      OutputTensor output;
      output.source_dtype = info.dtype;
      output.info = std::move(info);
      output.built_layer = condensed.plan->layer;
      shard.tensors.push_back(std::move(output));
    }
  }

  void AddTensor(const TensorInfo& tensor, OutputShard& shard) {
    const TensorRole role = model_.RoleOf(tensor.name);
    if (const auto it = condensed_.find(role.layer);
        role.kind != TensorKind::kOther && it != condensed_.end()) {
      PlaceCondensed(it->second, shard);
      return;
    }
    if (absorbed_.contains(tensor.name)) return;
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

  void LayOut(OutputShard& shard, const SafetensorsFile& source) const {
    std::map<std::string, std::string> metadata = source.metadata();
    metadata.try_emplace("format", "pt");  // some loaders refuse files without it
    std::vector<TensorInfo> infos;
    for (const OutputTensor& tensor : shard.tensors) infos.push_back(tensor.info);
    // Data begin behind the header and its length. Small files stay as small as they can be.
    constexpr uint64_t kLargeBytes = uint64_t{64} << 20;
    std::optional<uint64_t> like_source;
    // Packed tensors are aligned in their file, small or not.
    const bool aligned = model_.config().is_packed();
    if (aligned || source.file().size() >= kLargeBytes) like_source = source.header().size() + 8;
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

  // The formats of what is left, experts in their new order.
  std::vector<LayerFormats> KeptFormats() const {
    std::vector<LayerFormats> formats;
    for (size_t l = 0; l < kept_.size(); ++l) {
      const LayerConfig& layer = model_.config().layers[l];
      LayerFormats& left = formats.emplace_back(layer.formats);
      if (!layer.is_moe || left.experts.empty()) continue;
      left.experts.clear();
      for (const int32_t expert : kept_[l]) {
        left.experts.push_back(layer.formats.experts[static_cast<size_t>(expert)]);
      }
    }
    return formats;
  }

  void WriteConfig(RewritePlan& out) const {
    OrderedJson config = model_.checkpoint().config();
    std::vector<int64_t> experts(kept_.size());
    bool uneven = false;
    int64_t routed = -1;  // experts of the first layer that keeps its router
    const std::vector<int32_t> moe = model_.config().MoeLayers();
    for (const int32_t layer : moe) {
      const auto at = static_cast<size_t>(layer);
      if (condensed_.contains(layer)) continue;
      experts[at] = std::ssize(kept_[at]);
      if (routed < 0) routed = experts[at];
      uneven = uneven || experts[at] != routed;
    }
    if (uneven && target_ != "winnow") {
      throw UsageError("the plan keeps different numbers of experts in different layers",
                       "config.json has one number for all layers; keep the same in each, or set "
                       "the plan's target to winnow alone");
    }
    const Family& family = *model_.config().family;
    if (uneven) {
      config = ConfigWithExpertsPerLayer(config, family, experts);
    } else if (routed >= 0) {
      config = ConfigWithExperts(config, family, routed);
    }
    std::vector<CondensedLayer> condensed;
    for (const auto& [layer, of] : condensed_) {
      condensed.push_back(CondensedConfig(model_, *of.plan, of.form));
    }
    if (stock_width_ > 0) {
      std::vector<int32_t> layers;
      for (const auto& [layer, of] : condensed_) layers.push_back(layer);
      if (uneven) {
        throw UsageError("layers keep different numbers of experts: no family's own config says so",
                         "keep the same in each layer that is not condensed, or leave --stock out");
      }
      config = ConfigWithDenseLayers(config, model_.config(), layers, stock_width_);
    } else {
      config = ConfigWithCondensedLayers(config, condensed);
    }
    // Thresholds hold among the experts they were measured among.
    const bool pruned = out.experts_after < out.experts_before;
    if (!betas_.empty() || pruned || !condensed_.empty()) config = ConfigWithBetas(config, betas_);
    if (options_.dtype) {
      const char* name = *options_.dtype == Dtype::kF32    ? "float32"
                         : *options_.dtype == Dtype::kBF16 ? "bfloat16"
                                                           : "float16";
      config[config.contains("dtype") ? "dtype" : "torch_dtype"] = name;
    }
    if (options_.export_code) config = ConfigWithModelingCode(config);
    if (model_.config().is_packed()) {
      config = ConfigWithFormats(config, KeptFormats(), model_.config().lm_head_format);
    }
    out.config_json = config.dump(2) + "\n";
  }

  const Model& model_;
  const ApplyOptions& options_;
  std::vector<std::vector<int32_t>> kept_;
  std::vector<double> betas_;
  std::string target_;
  int64_t stock_width_ = 0;
  std::map<int32_t, Condensed> condensed_;   // by decoder layer
  std::map<std::string, int32_t> absorbed_;  // tensors that fused layers take in
};

}  // namespace

RewritePlan PlanRewrite(const Model& model, const CompressionPlan& plan,
                        const ApplyOptions& options) {
  CheckPlan(plan, model);
  return Planner(model, plan, options).Run();
}

}  // namespace winnow
