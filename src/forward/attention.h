// The attention block of a decoder layer on whole sequences: norm, projections, q/k norm, RoPE,
// causal softmax attention with grouped heads, output projection, added to the residual stream. A
// token's result depends on its own sequence alone, bit for bit, whatever else is in the call.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/thread_pool.h"       // ThreadPool
#include "forward/kv_cache.h"       // LayerCache
#include "forward/rope_table.h"     // RopeTable
#include "kernels/matmul.h"         // PackedRows
#include "model/model_config.h"     // ModelConfig
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

// What becomes of one token's projections [query_width], [kv_width] before attention, biases added:
// norms of queries and keys, clipping, rotation to its position.
void NormAndRotateToken(const ModelConfig& config, const LayerWeights& weights,
                        const RopeTable& rope, int64_t position, float* q, float* k, float* v);

class AttentionBlock {
 public:
  AttentionBlock(const ModelConfig& config, ThreadPool& pool,
                 ComputePrecision precision = ComputePrecision::kF32);
  ~AttentionBlock();

  // hidden [n, hidden_size], n = sum of `lengths`, sequences one after the other, positions from 0.
  void Run(const LayerWeights& weights, std::span<const int64_t> lengths, float* hidden);

  // What the output projection multiplied in the last Run [n, query_width].
  const float* attended() const { return attended_.data(); }

  // n new tokens of one sequence that already has `past` tokens in `cache` (of `capacity` rows a
  // head); appends them to it.
  void RunCached(const LayerWeights& weights, int64_t past, int64_t n, int64_t capacity,
                 LayerCache& cache, float* hidden);

  // Scratch for n tokens with sequences up to `longest`, for memory plans.
  static uint64_t ScratchBytes(const ModelConfig& config, int64_t n, int64_t longest,
                               int num_threads);

 private:
  struct Head;           // one (sequence, kv head) of work
  struct WorkerScratch;  // one per thread
  void Project(const LayerWeights& weights, int64_t n, const float* hidden);
  void NormAndRotate(const LayerWeights& weights, int64_t n, std::span<const int64_t> positions);
  void Attend(const Head& head, int worker);
  void Output(const LayerWeights& weights, int64_t n, float* hidden);

  const ModelConfig& config_;
  ThreadPool& pool_;
  const ComputePrecision precision_;
  RopeTable rope_;
  AlignedBuffer<float> normed_, q_, k_, v_, attended_, projected_;
  PackedRows packed_;
  std::vector<WorkerScratch> workers_;
};

}  // namespace winnow
