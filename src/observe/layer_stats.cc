#include "observe/layer_stats.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/checked_math.h"
#include "base/error.h"
#include "checkpoint/safetensors_writer.h"

namespace winnow {
namespace {

std::string LayOut(std::vector<TensorInfo>& tensors) {
  return LayOutSafetensors(tensors, {{"format", "winnow.stats/2"}});
}

}  // namespace

std::vector<TensorInfo> LayerStatsLayout(const StatsInfo& info, const StatsLayer& layer) {
  const auto tokens = static_cast<uint64_t>(info.num_tokens());
  const auto experts = static_cast<uint64_t>(layer.num_experts);
  const auto hidden = static_cast<uint64_t>(info.hidden_size);
  std::vector<TensorInfo> tensors;
  const auto add = [&](std::string name, Dtype dtype, std::vector<uint64_t> shape) {
    tensors.push_back({.name = std::move(name), .dtype = dtype, .shape = std::move(shape)});
  };
  const bool outputs = info.level != StatsLevel::kRouting;
  for (size_t s = 0; s < info.sources.size(); ++s) {
    const std::string prefix = fmt::format("sums.{}.", s);
    add(prefix + "weight", Dtype::kF64, {experts});
    if (outputs) {
      for (const char* name : {"selected_output", "weighted_output", "squared_weight_output"}) {
        add(prefix + name, Dtype::kF64, {experts, hidden});
      }
    }
    if (outputs) add(prefix + "largest_output", Dtype::kF64, {experts});
    if (info.level == StatsLevel::kFull) add(prefix + "output", Dtype::kF64, {experts, hidden});
    add(prefix + "tokens", Dtype::kI64, {experts});
  }
  add("weight_flatness", Dtype::kF64, {experts});
  add("router_logits", Dtype::kF32, {tokens, experts});
  if (info.level == StatsLevel::kFull) {
    add("gram", Dtype::kF32, {tokens, experts * (experts + 1) / 2});
  }
  if (outputs) {
    add("selected_norm", Dtype::kF32, {tokens, static_cast<uint64_t>(info.num_experts_per_tok)});
  }
  add("residual_norm_squared", Dtype::kF32, {tokens});
  add("stream_norm_squared", Dtype::kF32, {tokens});
  if (outputs) {
    add("residual_dot_routed", Dtype::kF32, {tokens});
    add("routed_norm_squared", Dtype::kF32, {tokens});
  }
  if (info.token_weights) add("token_weight", Dtype::kF32, {tokens});
  if (info.progressive_keep) {
    add("target_dot", Dtype::kF32, {tokens, experts});
    add("target_norm_squared", Dtype::kF32, {tokens});
  }
  return tensors;
}

uint64_t StatsBytes(const StatsInfo& info) {
  uint64_t total = 0;
  for (const StatsLayer& layer : info.layers) {
    std::vector<TensorInfo> tensors = LayerStatsLayout(info, layer);
    uint64_t bytes = LayOut(tensors).size();
    for (const TensorInfo& tensor : tensors) bytes += tensor.bytes;
    total = CheckedAdd(total, bytes, "statistics");
  }
  return total;
}

LayerStatsWriter::LayerStatsWriter(const fs::path& folder, const StatsInfo& info,
                                   const StatsLayer& layer)
    : path_(LayerStatsPath(folder, layer.layer)),
      file_(File::Create(path_.string() + ".tmp")),
      tensors_(LayerStatsLayout(info, layer)) {
  const std::string header = LayOut(tensors_);
  file_.WriteAt(0, std::as_bytes(std::span(header)));
  file_.Truncate(header.size() +
                 (tensors_.back().file_offset + tensors_.back().bytes - header.size()));
}

const TensorInfo& LayerStatsWriter::Find(const std::string& name) const {
  for (const TensorInfo& tensor : tensors_) {
    if (tensor.name == name) return tensor;
  }
  throw RuntimeError(fmt::format("statistics have no record \"{}\" at this level", name));
}

void LayerStatsWriter::WriteRecords(const std::string& name, int64_t first_token,
                                    std::span<const float> data) {
  const TensorInfo& tensor = Find(name);
  const uint64_t row_bytes = tensor.shape[0] == 0 ? 0 : tensor.bytes / tensor.shape[0];
  file_.WriteAt(tensor.file_offset + static_cast<uint64_t>(first_token) * row_bytes,
                std::as_bytes(data));
}

void LayerStatsWriter::WriteWhole(const std::string& name, std::span<const std::byte> data) {
  WriteBytes(name, 0, data);
}

void LayerStatsWriter::WriteBytes(const std::string& name, uint64_t offset,
                                  std::span<const std::byte> data) {
  file_.WriteAt(Find(name).file_offset + offset, data);
}

void LayerStatsWriter::Finish() {
  file_.Sync();
  RenameDurably(path_.string() + ".tmp", path_);
}

LayerStatsReader::LayerStatsReader(const fs::path& folder, const StatsInfo& info,
                                   const StatsLayer& layer)
    : file_(SafetensorsFile::Open(LayerStatsPath(folder, layer.layer))),
      num_sources_(info.sources.size()),
      num_experts_(layer.num_experts),
      has_target_(info.progressive_keep.has_value()),
      has_weights_(info.token_weights) {
  for (const TensorInfo& expected : LayerStatsLayout(info, layer)) {
    const TensorInfo& found = file_.Get(expected.name);
    if (found.dtype != expected.dtype || found.shape != expected.shape) {
      throw ModelError(fmt::format("{}: {}: expected {}, got {}", file_.path().string(),
                                   expected.name, expected.Describe(), found.Describe()),
                       "the statistics are damaged; observe again");
    }
  }
}

void LayerStatsReader::ReadRows(const char* name, int64_t first, int64_t count,
                                std::vector<float>& out) const {
  const TensorInfo& tensor = file_.Get(name);
  const uint64_t columns = tensor.shape.size() > 1 ? tensor.shape[1] : 1;
  out.resize(static_cast<size_t>(count) * columns);
  file_.ReadPart(tensor, static_cast<uint64_t>(first) * columns * sizeof(float),
                 std::as_writable_bytes(std::span(out)));
}

void LayerStatsReader::ReadTokens(int64_t first_token, int64_t num_tokens,
                                  TokenRecords& out) const {
  out.num_tokens = num_tokens;
  ReadRows("router_logits", first_token, num_tokens, out.router_logits);
  ReadRows("gram", first_token, num_tokens, out.gram);
  ReadRows("stream_norm_squared", first_token, num_tokens, out.stream_norm_squared);
  if (has_weights_) ReadRows("token_weight", first_token, num_tokens, out.token_weight);
  if (!has_target_) return;
  ReadRows("target_dot", first_token, num_tokens, out.target_dot);
  ReadRows("target_norm_squared", first_token, num_tokens, out.target_norm_squared);
}

void LayerStatsReader::ReadRouting(int64_t first_token, int64_t num_tokens,
                                   RoutingRecords& out) const {
  out.num_tokens = num_tokens;
  ReadRows("router_logits", first_token, num_tokens, out.router_logits);
  if (has_weights_) ReadRows("token_weight", first_token, num_tokens, out.token_weight);
  if (file_.Find("selected_norm") == nullptr) return;
  ReadRows("selected_norm", first_token, num_tokens, out.selected_norm);
  ReadRows("residual_norm_squared", first_token, num_tokens, out.residual_norm_squared);
  ReadRows("residual_dot_routed", first_token, num_tokens, out.residual_dot_routed);
  ReadRows("routed_norm_squared", first_token, num_tokens, out.routed_norm_squared);
}

std::vector<double> LayerStatsReader::LargestOutput() const {
  if (file_.Find("selected_norm") == nullptr) return {};
  std::vector<double> largest(static_cast<size_t>(num_experts_)), part(largest.size());
  for (size_t s = 0; s < num_sources_; ++s) {
    file_.Read(file_.Get(fmt::format("sums.{}.largest_output", s)),
               std::as_writable_bytes(std::span(part)));
    for (size_t e = 0; e < part.size(); ++e) largest[e] = std::max(largest[e], part[e]);
  }
  return largest;
}

std::vector<double> LayerStatsReader::WeightFlatness() const {
  std::vector<double> flatness(static_cast<size_t>(num_experts_));
  file_.Read(file_.Get("weight_flatness"), std::as_writable_bytes(std::span(flatness)));
  return flatness;
}

std::vector<int64_t> LayerStatsReader::Coverage() const {
  std::vector<int64_t> total(static_cast<size_t>(num_experts_)), part(total.size());
  for (size_t s = 0; s < num_sources_; ++s) {
    file_.Read(file_.Get(fmt::format("sums.{}.tokens", s)),
               std::as_writable_bytes(std::span(part)));
    for (size_t e = 0; e < total.size(); ++e) total[e] += part[e];
  }
  return total;
}

}  // namespace winnow
