// What is trained and the optimiser's state: f32 master copies, both moments and the gradients of a
// step, in memory or in a file of the working folder, taken a layer at a time. Forward sees the
// masters rounded to the format they will be stored in. Owned by TrainRun.
//
// Promise: the same values whether in memory or spilled, and for any number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "base/aligned_buffer.h"    // AlignedBuffer
#include "base/file.h"              // File, fs
#include "base/thread_pool.h"       // ThreadPool
#include "kernels/backward.h"       // AdamWFactors
#include "model/model.h"            // Model
#include "train/trainable.h"        // Parameter
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

struct ParameterStoreOptions {
  fs::path spill = {};     // empty: everything in memory
  bool pure_bf16 = false;  // weights and moments are bf16, every operation rounded (as published)
  std::optional<Dtype> dtype = {};  // forward's format; nothing: as stored
};

class ParameterStore {
 public:
  enum Array : int { kMaster, kMoment1, kMoment2, kGradient, kNumArrays };

  // Masters start as the model's weights, moments at zero.
  ParameterStore(const Model& model, std::vector<Parameter> parameters,
                 const ParameterStoreOptions& options, ThreadPool& pool);

  const std::vector<Parameter>& parameters() const { return parameters_; }
  uint64_t count() const { return count_; }
  bool has_layer(int64_t layer) const { return range(layer).second > range(layer).first; }
  int64_t lowest_layer() const;   // num_layers if only the final norm is trained
  int64_t highest_layer() const;  // -1 likewise
  Dtype DtypeOf(const Parameter& parameter) const;

  // The layer with what is trained in place of what was read; valid until the next call.
  const LayerWeights& Substitute(int64_t layer, const LayerWeights& frozen);
  // The final norm as it is now.
  std::vector<float> FinalNorm(const std::vector<float>& frozen);
  // Zeroed gradients of a layer (-1: the final norm); EndGradients keeps what was added.
  GradientSlots BeginGradients(int64_t layer);
  float* FinalNormGradient();  // null if frozen; begins as BeginGradients does
  void EndGradients(int64_t layer);

  // Over all gradients, squares summed in double in a fixed order.
  double GradientNorm();
  void Step(const AdamWFactors& factors);
  // Calls body(first, values) for pieces of an array in order.
  void ForPieces(Array array, const std::function<void(uint64_t, std::span<float>)>& body,
                 bool writes);

  static uint64_t MemoryBytes(const std::vector<Parameter>& parameters, bool spilled,
                              int64_t num_layers);

 private:
  std::pair<uint64_t, uint64_t> range(int64_t layer) const {
    return ranges_[static_cast<size_t>(layer < 0 ? std::ssize(ranges_) - 1 : layer)];
  }
  float* Load(Array array, uint64_t first, uint64_t count, AlignedBuffer<float>& scratch);
  void Store(Array array, uint64_t first, std::span<const float> values);
  void StepPiece(const AdamWFactors& factors, uint64_t count, const float* gradient, float* master,
                 float* m, float* v);

  std::vector<Parameter> parameters_;
  ParameterStoreOptions options_;
  ThreadPool& pool_;
  uint64_t count_ = 0;
  std::vector<std::pair<uint64_t, uint64_t>> ranges_;  // of each layer, then of the final norm
  AlignedBuffer<float> memory_[kNumArrays];
  std::optional<File> file_;
  AlignedBuffer<float> layer_masters_, layer_gradients_, scratch_[kNumArrays];
  AlignedBuffer<std::byte> rounded_;
  LayerWeights substituted_;
};

}  // namespace winnow
