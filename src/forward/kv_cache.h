// Keys and values of the tokens a sequence has already seen, per layer, for token-by-token
// generation.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"  // AlignedBuffer

namespace winnow {

// One layer's cache of one sequence: keys after RoPE and values, both [kv_heads, capacity,
// head_dim].
struct LayerCache {
  AlignedBuffer<float> keys, values;
};

class KeyValueCache {
 public:
  KeyValueCache(int64_t num_layers, int64_t num_kv_heads, int64_t head_dim, int64_t capacity);
  LayerCache& layer(int64_t index) { return layers_[static_cast<size_t>(index)]; }
  int64_t capacity() const { return capacity_; }
  // Tokens every layer holds; advanced by the caller after a full pass.
  int64_t length() const { return length_; }
  void Advance(int64_t tokens) { length_ += tokens; }

  static uint64_t Bytes(int64_t num_layers, int64_t num_kv_heads, int64_t head_dim,
                        int64_t capacity) {
    return static_cast<uint64_t>(num_layers) * static_cast<uint64_t>(num_kv_heads) *
           static_cast<uint64_t>(head_dim) * static_cast<uint64_t>(capacity) * 2 * sizeof(float);
  }

 private:
  std::vector<LayerCache> layers_;
  int64_t capacity_;
  int64_t length_ = 0;
};

inline KeyValueCache::KeyValueCache(int64_t num_layers, int64_t num_kv_heads, int64_t head_dim,
                                    int64_t capacity)
    : layers_(static_cast<size_t>(num_layers)), capacity_(capacity) {
  const auto count = static_cast<size_t>(num_kv_heads * head_dim * capacity);
  for (LayerCache& layer : layers_) {
    layer.keys = AlignedBuffer<float>(count);
    layer.values = AlignedBuffer<float>(count);
  }
}

}  // namespace winnow
