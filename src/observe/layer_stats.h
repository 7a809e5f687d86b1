// One MoE layer's statistics on disk: `layer-NNNN.safetensors` in a statistics folder.
//
// Per-token records (T tokens, E experts, k per token):
//   router_logits          F32 [T, E]
//   gram                   F32 [T, E(E+1)/2]  f_i . f_j, upper triangle by rows            (full)
//   selected_norm          F32 [T, k]  |f_e| of the selected experts, best first          (routed)
//   residual_norm_squared  F32 [T]     |h|^2 of the stream before the block
//   stream_norm_squared    F32 [T]     |h'|^2 after the block
//   residual_dot_routed    F32 [T]     h . z                                              (routed)
//   routed_norm_squared    F32 [T]     |z|^2                                              (routed)
//   token_weight           F32 [T]     what the token counts for, if the text has a mask
//   target_dot             F32 [T, E]  f_e . z*, z* the target of progressive pruning
//   target_norm_squared    F32 [T]     |z*|^2 (progressive)
// Sums by source s, in F64 over tokens in order: sums.{s}.tokens I64 [E] (coverage),
// sums.{s}.weight [E],
//   sums.{s}.selected_output, .weighted_output, .squared_weight_output [E, hidden] (routed, full)
//   .largest_output [E], the largest |f| of one channel (routed, full), and .output [E, hidden]
//   (full).
// Of the weights: weight_flatness F64 [E], mean |w| / rms w over an expert's three matrices.
// The layout is fixed when the file is created, so records are written where they belong while the
// layer runs and nothing is held in memory.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/aligned_buffer.h"          // AlignedBuffer
#include "base/file.h"                    // File, fs
#include "checkpoint/safetensors_file.h"  // SafetensorsFile
#include "observe/stats_info.h"           // StatsInfo

namespace winnow {

// The tensors of a layer's file, in order.
std::vector<TensorInfo> LayerStatsLayout(const StatsInfo& info, const StatsLayer& layer);
// Bytes of all layer files, for the disk check.
uint64_t StatsBytes(const StatsInfo& info);

class LayerStatsWriter {
 public:
  LayerStatsWriter(const fs::path& folder, const StatsInfo& info, const StatsLayer& layer);
  // Rows [first_token, first_token + data.size() / columns) of a per-token record.
  void WriteRecords(const std::string& name, int64_t first_token, std::span<const float> data);
  void WriteWhole(const std::string& name, std::span<const std::byte> data);
  void WriteBytes(const std::string& name, uint64_t offset, std::span<const std::byte> data);
  // Syncs and renames into place.
  void Finish();

 private:
  const TensorInfo& Find(const std::string& name) const;
  fs::path path_;
  File file_;
  std::vector<TensorInfo> tensors_;
};

// What consecutive tokens count for.
struct TokenWeights {
  std::vector<float> token_weight;  // [n], empty: all alike

  double Weight(size_t token) const {
    return token_weight.empty() ? 1.0 : static_cast<double>(token_weight[token]);
  }
};

// Records of consecutive tokens, as plans read them.
struct TokenRecords : TokenWeights {
  int64_t num_tokens = 0;
  std::vector<float> router_logits;        // [n, E]
  std::vector<float> gram;                 // [n, E(E+1)/2]
  std::vector<float> target_dot;           // [n, E], progressive only
  std::vector<float> target_norm_squared;  // [n], progressive only
  std::vector<float> stream_norm_squared;  // [n], of the residual stream after the layer
};

// What scores of single experts need, at every level of statistics.
struct RoutingRecords : TokenWeights {
  int64_t num_tokens = 0;
  std::vector<float> router_logits;  // [n, E]
  std::vector<float> selected_norm;  // [n, k], best first; empty at level routing
  // [n] |h|^2, h . z and |z|^2; empty at level routing
  std::vector<float> residual_norm_squared, residual_dot_routed, routed_norm_squared;
};

class LayerStatsReader {
 public:
  // ModelError if the file does not have the layout `info` promises.
  LayerStatsReader(const fs::path& folder, const StatsInfo& info, const StatsLayer& layer);
  void ReadTokens(int64_t first_token, int64_t num_tokens, TokenRecords& out) const;
  void ReadRouting(int64_t first_token, int64_t num_tokens, RoutingRecords& out) const;
  bool has_target() const { return has_target_; }
  // Tokens that selected each expert, over all sources [E].
  std::vector<int64_t> Coverage() const;
  // The largest output of one channel of each expert, over all sources [E]; empty at level routing.
  std::vector<double> LargestOutput() const;
  std::vector<double> WeightFlatness() const;
  const SafetensorsFile& file() const { return file_; }

 private:
  void ReadRows(const char* name, int64_t first, int64_t count, std::vector<float>& out) const;
  SafetensorsFile file_;
  size_t num_sources_;
  int64_t num_experts_;
  bool has_target_;
  bool has_weights_;
};

}  // namespace winnow
