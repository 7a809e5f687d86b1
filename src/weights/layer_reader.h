// Reads layers from disk into buffers of the budget, the next one while the caller computes with
// this one. At most two layers are held (one without prefetch), or all of them when `keep_resident`
// is set. Explicit positional reads: nothing is mapped. Errors of the background read surface in
// Get().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "model/model.h"            // Model
#include "weights/layer_weights.h"  // LayerWeights

namespace winnow {

struct LayerReaderOptions {
  bool prefetch = true;        // two layers in memory instead of one
  bool keep_resident = false;  // every layer stays (generation)
  // Experts to load of each layer, ascending; an empty outer list or an empty inner list means all.
  std::vector<std::vector<int32_t>> kept_experts = {};
};

class LayerReader {
 public:
  LayerReader(const Model& model, LayerReaderOptions options);
  ~LayerReader();
  LayerReader(const LayerReader&) = delete;
  LayerReader& operator=(const LayerReader&) = delete;

  // The weights of `layer`; valid until the next call. Reading ahead assumes ascending layers,
  // wrapping around to the first.
  const LayerWeights& Get(int64_t layer) { return Get(layer, layer + 1); }
  // The same for callers that go through layers in another order: `next` is read ahead.
  const LayerWeights& Get(int64_t layer, int64_t next);
  // Bytes of weights read from disk so far.
  uint64_t bytes_read() const;
  // Seconds the callers of Get waited for the disk.
  double wait_seconds() const;

  // What the largest layer occupies, with these options.
  static uint64_t LargestLayerBytes(const Model& model, const LayerReaderOptions& options);
  static uint64_t AllLayersBytes(const Model& model, const LayerReaderOptions& options);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A matrix of the model outside its layers (lm_head) or a part of its rows, in memory. A part of a
// packed matrix begins at a multiple of kPackedRows.
struct LoadedMatrix {
  AlignedBuffer<std::byte> storage;
  WeightMatrix matrix;
};
LoadedMatrix LoadRows(const Model& model, const TensorSlice& slice, int64_t first_row,
                      int64_t num_rows);
std::vector<float> LoadVector(const Model& model, const TensorSlice& slice);
// Rows `ids` of the embedding as f32 [ids, hidden]; each distinct row is read once. Ids must be
// below vocab_size: UsageError names the first that is not.
void LoadEmbeddings(const Model& model, std::span<const int32_t> ids, float* out);

}  // namespace winnow
