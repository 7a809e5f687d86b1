// One batch through the model and back, layer by layer: each layer's weights are read once for
// forward and once for backward, whatever the number of parts a batch is cut into. Forward keeps
// the stream at the entry of every layer from the lowest trained one on; backward makes each
// layer's tape anew from it, or finds it kept if memory allows. Owned by TrainRun, which has the
// optimiser.
//
// Promise: the same gradients for any number of threads and any of the ways to save memory.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/file.h"              // File, fs
#include "base/progress.h"          // JobControl
#include "base/thread_pool.h"       // ThreadPool
#include "model/model.h"            // Model
#include "train/layer_gradient.h"   // LayerGradient, LayerTape
#include "train/output_loss.h"      // OutputLoss
#include "train/parameter_store.h"  // ParameterStore
#include "weights/layer_reader.h"   // LayerReader

namespace winnow {

enum class Distill : uint8_t {
  kNone,
  kLogits,  // KL(teacher || student) of the next token
  kLayers,  // |h - h*|^2 / |h*|^2 of the stream after each trained layer, mean over tokens, summed
};

struct PassOptions {
  ComputePrecision compute = ComputePrecision::kF32;
  int64_t micro_batch = 0;  // rows computed at once; 0: all of a batch
  double balance_alpha = 0;
  bool balance_by_row = true;
  const Model* teacher = nullptr;
  Distill distill = Distill::kNone;
  double distill_weight = 1;  // of the teacher; the rest is cross entropy's
  // How memory is used.
  bool resident = false;  // all layers and lm_head stay
  bool prefetch = false;
  bool keep_tapes = false;
  fs::path spill_folder = {};  // not empty: streams live in files there
};

struct PassResult {
  double loss = 0;           // what is minimised
  double cross_entropy = 0;  // of the next token; 0 if lm_head was not needed
  double weight = 0;         // what the scored tokens count for
  int64_t tokens = 0;
};

// Streams of a batch at several depths, in memory or in a file.
class StreamStore {
 public:
  explicit StreamStore(fs::path spill) : spill_(std::move(spill)) {}
  void Resize(int64_t levels, int64_t tokens, int64_t hidden);
  // [count, hidden] from `first` on; in `slot`s of its own if in a file, so that two can be held.
  float* Load(int64_t level, int64_t first, int64_t count, int slot);
  // Where to compute it: nothing is read.
  float* Place(int64_t level, int64_t first, int64_t count, int slot);
  void Store(int64_t level, int64_t first, int64_t count, const float* values);

 private:
  fs::path spill_;
  int64_t tokens_ = 0, hidden_ = 0;
  AlignedBuffer<float> memory_, slots_[2];
  std::optional<File> file_;
};

class BatchPass {
 public:
  BatchPass(const Model& model, ParameterStore& store, const PassOptions& options, ThreadPool& pool,
            const JobControl& control);
  ~BatchPass();

  // Loss of a batch; with `gradients` also those of all parameters, into the store.
  PassResult Run(const TrainBatch& batch, bool gradients);

 private:
  struct Teacher;
  struct Part {
    TrainBatch batch;
    int64_t first_token = 0;
  };
  void Cut(const TrainBatch& batch);
  void Forward(bool gradients);
  void ForwardLayer(int64_t layer, const LayerWeights& weights, bool gradients);
  void AdvanceTeacher(int64_t layer);
  double CompareLayer(int64_t layer, const Part& part, const float* after, bool gradients);
  void Output(bool gradients);
  void Backward();
  void InjectLayer(int64_t layer, const Part& part, float* d_stream);
  int64_t LevelOf(int64_t layer, bool gradients) const {
    return gradients ? std::max<int64_t>(0, layer - lowest_) : 0;
  }
  // Layers the loss depends on.
  int64_t num_layers() const { return needs_head_ ? model_.config().num_layers() : highest_ + 1; }

  const Model& model_;
  ParameterStore& store_;
  const PassOptions options_;
  ThreadPool& pool_;
  const JobControl& control_;
  LayerReader reader_;
  LayerGradient layer_;
  OutputLoss output_;
  const int64_t lowest_, highest_;
  const bool needs_head_;
  std::vector<float> frozen_norm_;
  LoadedMatrix lm_head_;
  std::unique_ptr<Teacher> teacher_;
  StreamStore streams_, injected_;
  std::vector<int64_t> injected_level_;  // of each layer, -1: not compared
  std::vector<Part> parts_;
  std::vector<LayerTape> tapes_;  // kept: of (layer - lowest) * parts + part; else one
  AlignedBuffer<float> d_stream_;
  BalanceLoss balance_;
  int64_t tokens_ = 0;
  double compared_tokens_ = 0;
  PassResult result_;
};

}  // namespace winnow
