#include "weights/layer_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <thread>

#include "base/error.h"

namespace winnow {
namespace {

constexpr uint64_t kAlignment = 64;  // of each matrix in the layer's buffer

uint64_t Aligned(uint64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Calls visit(slice, matrix) for every matrix of a layer, in the order they lie in the buffer.
// `weights` may be null to only measure.
template <class Visit>
void ForEachMatrix(const LayerSlices& slices, const std::vector<int32_t>& kept,
                   LayerWeights* weights, const Visit& visit) {
  LayerWeights scratch;
  LayerWeights& w = weights != nullptr ? *weights : scratch;
  visit(slices.q, w.q);
  visit(slices.k, w.k);
  visit(slices.v, w.v);
  visit(slices.o, w.o);
  visit(slices.shared.gate, w.shared.gate);
  visit(slices.shared.up, w.shared.up);
  visit(slices.shared.down, w.shared.down);
  visit(slices.shared_router, w.shared_router);
  visit(slices.dense.gate, w.dense.gate);
  visit(slices.dense.up, w.dense.up);
  visit(slices.dense.down, w.dense.down);
  w.experts.resize(kept.size());
  for (size_t i = 0; i < kept.size(); ++i) {
    const FeedForwardSlices& expert = slices.experts[static_cast<size_t>(kept[i])];
    visit(expert.gate, w.experts[i].gate);
    visit(expert.up, w.experts[i].up);
    visit(expert.down, w.experts[i].down);
  }
}

std::vector<int32_t> KeptExperts(const LayerSlices& slices, const LayerReaderOptions& options,
                                 size_t layer) {
  if (layer < options.kept_experts.size() && !options.kept_experts[layer].empty()) {
    return options.kept_experts[layer];
  }
  std::vector<int32_t> all(slices.experts.size());
  std::iota(all.begin(), all.end(), 0);
  return all;
}

uint64_t LayerBytes(const LayerSlices& slices, const std::vector<int32_t>& kept) {
  uint64_t total = 0;
  ForEachMatrix(slices, kept, nullptr,
                [&](const TensorSlice& slice, WeightMatrix&) { total += Aligned(slice.bytes()); });
  return total + Aligned(slices.router.bytes());
}

struct Slot {
  AlignedBuffer<std::byte> storage;
  LayerWeights weights;
  int64_t layer = -1;
};

// Fills `slot` with a layer; returns the bytes read.
uint64_t ReadLayer(const Model& model, const LayerReaderOptions& options, int64_t layer,
                   Slot& slot) {
  const LayerSlices& slices = model.layers()[static_cast<size_t>(layer)];
  const std::vector<int32_t> kept = KeptExperts(slices, options, static_cast<size_t>(layer));
  const uint64_t bytes = LayerBytes(slices, kept);
  if (slot.storage.size() < bytes) slot.storage = AlignedBuffer<std::byte>(bytes);
  LayerWeights& weights = slot.weights;
  weights = LayerWeights{};
  uint64_t used = 0, read = 0;
  const auto take = [&](const TensorSlice& slice, WeightMatrix& matrix, int64_t rows) {
    matrix = {.data = slot.storage.data() + used,
              .rows = rows,
              .cols = slice.cols,
              .dtype = slice.tensor->dtype,
              .packed = slice.packed};
    used += Aligned(matrix.bytes());
    return std::span<std::byte>(slot.storage.data() + (matrix.data - slot.storage.data()),
                                matrix.bytes());
  };
  ForEachMatrix(slices, kept, &weights, [&](const TensorSlice& slice, WeightMatrix& matrix) {
    if (!slice.exists()) return;
    const std::span<std::byte> out = take(slice, matrix, slice.rows);
    model.checkpoint().ReadPart(*slice.tensor, slice.offset_bytes, out);
    read += out.size();
  });
  if (slices.router.exists()) {  // only the rows of the experts that are kept
    const TensorSlice& slice = slices.router;
    const std::span<std::byte> out = take(slice, weights.router, static_cast<int64_t>(kept.size()));
    const size_t row_bytes = out.size() / kept.size();
    for (size_t i = 0; i < kept.size(); ++i) {
      model.checkpoint().ReadPart(*slice.tensor,
                                  slice.offset_bytes + static_cast<uint64_t>(kept[i]) * row_bytes,
                                  out.subspan(i * row_bytes, row_bytes));
    }
    read += out.size();
  }
  weights.input_norm = LoadVector(model, slices.input_norm);
  weights.post_attention_norm = LoadVector(model, slices.post_attention_norm);
  weights.q_bias = LoadVector(model, slices.q_bias);
  weights.k_bias = LoadVector(model, slices.k_bias);
  weights.v_bias = LoadVector(model, slices.v_bias);
  weights.o_bias = LoadVector(model, slices.o_bias);
  weights.q_norm = LoadVector(model, slices.q_norm);
  weights.k_norm = LoadVector(model, slices.k_norm);
  for (const double alpha : model.config().layers[static_cast<size_t>(layer)].expert_alphas) {
    weights.expert_alphas.push_back(static_cast<float>(alpha));
  }
  slot.layer = layer;
  return read;
}

}  // namespace

LayerWeights LayerWeights::WithExperts(const std::vector<int32_t>& kept,
                                       AlignedBuffer<std::byte>& router_rows) const {
  LayerWeights result = *this;
  result.experts.clear();
  const auto row_bytes = static_cast<size_t>(router.bytes() / static_cast<uint64_t>(router.rows));
  router_rows = AlignedBuffer<std::byte>(row_bytes * kept.size());
  for (size_t i = 0; i < kept.size(); ++i) {
    result.experts.push_back(experts[static_cast<size_t>(kept[i])]);
    std::memcpy(router_rows.data() + i * row_bytes,
                router.data + static_cast<size_t>(kept[i]) * row_bytes, row_bytes);
  }
  result.router.data = router_rows.data();
  result.router.rows = static_cast<int64_t>(kept.size());
  return result;
}

LayerWeights LayerWeights::Condensed(const std::vector<int32_t>& kept,
                                     std::vector<float> alphas) const {
  LayerWeights result = *this;
  result.experts.clear();
  for (const int32_t expert : kept) result.experts.push_back(experts[static_cast<size_t>(expert)]);
  result.expert_alphas = std::move(alphas);
  result.router = {};
  return result;
}

struct LayerReader::State {
  const Model& model;
  LayerReaderOptions options;
  std::vector<Slot> slots;  // 1, 2 or all layers
  uint64_t bytes_read = 0;
  double wait_seconds = 0;

  // The background thread reads `wanted` into slots[target]; all guarded by mutex.
  std::mutex mutex;
  std::condition_variable changed;
  std::thread thread;
  int64_t wanted = -1;
  size_t target = 0;
  bool stopping = false;
  std::exception_ptr failure;

  State(const Model& m, LayerReaderOptions o) : model(m), options(std::move(o)) {}

  void Loop() {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return stopping || wanted >= 0; });
      if (stopping) return;
      const int64_t layer = wanted;
      Slot& slot = slots[target];
      lock.unlock();
      uint64_t read = 0;
      std::exception_ptr problem;
      try {
        read = ReadLayer(model, options, layer, slot);
      } catch (...) {
        problem = std::current_exception();
      }
      lock.lock();
      bytes_read += read;
      if (problem) {
        failure = problem;
        slot.layer = -1;
      }
      wanted = -1;
      changed.notify_all();
    }
  }
};

LayerReader::LayerReader(const Model& model, LayerReaderOptions options)
    : state_(std::make_unique<State>(model, std::move(options))) {
  const size_t slots = state_->options.keep_resident
                           ? static_cast<size_t>(model.config().num_layers())
                           : (state_->options.prefetch ? 2 : 1);
  state_->slots.resize(slots);
  if (!state_->options.keep_resident && state_->options.prefetch) {
    // Both slots start at full size, so that the peak is reached at once and never grows.
    const uint64_t bytes = LargestLayerBytes(model, state_->options);
    for (Slot& slot : state_->slots) slot.storage = AlignedBuffer<std::byte>(bytes);
    state_->thread = std::thread([state = state_.get()] { state->Loop(); });
  }
}

LayerReader::~LayerReader() {
  if (!state_->thread.joinable()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  state_->thread.join();
}

const LayerWeights& LayerReader::Get(int64_t layer, int64_t next) {
  State& s = *state_;
  if (s.options.keep_resident || !s.options.prefetch) {
    Slot& slot = s.slots[s.options.keep_resident ? static_cast<size_t>(layer) : 0];
    if (slot.layer != layer) {
      const auto start = std::chrono::steady_clock::now();
      s.bytes_read += ReadLayer(s.model, s.options, layer, slot);
      s.wait_seconds +=
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return slot.weights;
  }
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(s.mutex);
  s.changed.wait(lock, [&] { return s.wanted < 0; });
  if (s.failure) std::rethrow_exception(std::exchange(s.failure, nullptr));
  size_t here = s.slots[0].layer == layer ? 0 : 1;
  if (s.slots[here].layer != layer) {  // first call, or not the layer that was guessed
    here = 0;
    s.target = here;
    s.wanted = layer;
    s.changed.notify_all();
    s.changed.wait(lock, [&] { return s.wanted < 0; });
    if (s.failure) std::rethrow_exception(std::exchange(s.failure, nullptr));
  }
  s.wait_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (next >= 0 && next != layer && next < s.model.config().num_layers() &&
      s.slots[1 - here].layer != next) {
    s.target = 1 - here;
    s.wanted = next;
    s.changed.notify_all();
  }
  return s.slots[here].weights;
}

uint64_t LayerReader::bytes_read() const {
  const std::lock_guard lock(state_->mutex);
  return state_->bytes_read;
}

double LayerReader::wait_seconds() const {
  return state_->wait_seconds;
}

uint64_t LayerReader::LargestLayerBytes(const Model& model, const LayerReaderOptions& options) {
  uint64_t largest = 0;
  for (size_t i = 0; i < model.layers().size(); ++i) {
    const LayerSlices& slices = model.layers()[i];
    largest = std::max(largest, LayerBytes(slices, KeptExperts(slices, options, i)));
  }
  return largest;
}

uint64_t LayerReader::AllLayersBytes(const Model& model, const LayerReaderOptions& options) {
  uint64_t total = 0;
  for (size_t i = 0; i < model.layers().size(); ++i) {
    const LayerSlices& slices = model.layers()[i];
    total += LayerBytes(slices, KeptExperts(slices, options, i));
  }
  return total;
}

LoadedMatrix LoadRows(const Model& model, const TensorSlice& slice, int64_t first_row,
                      int64_t num_rows) {
  LoadedMatrix loaded;
  loaded.matrix = {.data = nullptr,
                   .rows = num_rows,
                   .cols = slice.cols,
                   .dtype = slice.tensor->dtype,
                   .packed = slice.packed};
  uint64_t begin = 0;
  if (slice.packed.empty()) {
    begin = slice.bytes() / static_cast<uint64_t>(slice.rows) * static_cast<uint64_t>(first_row);
  } else if (first_row % kPackedRows == 0) {
    begin = PackedBytes(slice.packed, first_row, slice.cols);
  } else {
    throw RuntimeError(fmt::format("{}: row {} is inside a block of {} packed rows",
                                   slice.tensor->name, first_row, kPackedRows));
  }
  loaded.storage = AlignedBuffer<std::byte>(loaded.matrix.bytes());
  model.checkpoint().ReadPart(*slice.tensor, slice.offset_bytes + begin, loaded.storage.span());
  loaded.matrix.data = loaded.storage.data();
  return loaded;
}

std::vector<float> LoadVector(const Model& model, const TensorSlice& slice) {
  if (!slice.exists()) return {};
  const LoadedMatrix loaded = LoadRows(model, slice, 0, slice.rows);
  std::vector<float> values(static_cast<size_t>(slice.rows * slice.cols));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = LoadAsFloat(slice.tensor->dtype, loaded.storage.data(), i);
  }
  return values;
}

void LoadEmbeddings(const Model& model, std::span<const int32_t> ids, float* out) {
  const TensorSlice& table = model.embedding();
  const auto hidden = static_cast<size_t>(table.cols);
  std::vector<uint32_t> order(ids.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return ids[a] < ids[b]; });
  const uint64_t row_bytes = table.bytes() / static_cast<uint64_t>(table.rows);
  std::vector<std::byte> row(row_bytes);
  const float* previous = nullptr;
  int32_t previous_id = -1;
  for (const uint32_t at : order) {
    const int32_t id = ids[at];
    if (id < 0 || id >= table.rows) {
      throw UsageError(
          fmt::format("token id {} is outside the model's {} embedding rows", id, table.rows),
          "the ids were made with another tokenizer or another model");
    }
    float* target = out + at * hidden;
    if (id == previous_id) {
      std::memcpy(target, previous, hidden * sizeof(float));
    } else {
      model.checkpoint().ReadPart(*table.tensor,
                                  table.offset_bytes + static_cast<uint64_t>(id) * row_bytes, row);
      for (size_t i = 0; i < hidden; ++i) {
        target[i] = LoadAsFloat(table.tensor->dtype, row.data(), i);
      }
    }
    previous = target;
    previous_id = id;
  }
}

}  // namespace winnow
