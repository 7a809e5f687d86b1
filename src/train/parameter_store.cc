#include "train/parameter_store.h"

#include <algorithm>
#include <cmath>

#include "train/train_math.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr uint64_t kPiece = uint64_t{1} << 16;   // elements of a task
constexpr uint64_t kPieces = uint64_t{1} << 20;  // elements read from a file at once
constexpr uint64_t kAlignment = 64;              // of each matrix in the rounded copy

float RoundBf16(float value) {
  return FloatFromBf16(Bf16FromFloat(value));
}

}  // namespace

ParameterStore::ParameterStore(const Model& model, std::vector<Parameter> parameters,
                               const ParameterStoreOptions& options, ThreadPool& pool)
    : parameters_(std::move(parameters)), options_(options), pool_(pool) {
  ranges_.resize(static_cast<size_t>(model.config().num_layers()) + 1);
  for (const Parameter& p : parameters_) {
    auto& [first, end] = p.layer < 0 ? ranges_.back() : ranges_[static_cast<size_t>(p.layer)];
    if (first == end) first = p.offset;
    end = p.offset + p.count;
    count_ = end;
  }
  if (options_.spill.empty()) {
    for (AlignedBuffer<float>& array : memory_) array = AlignedBuffer<float>(count_);
  } else {
    file_ = File::Create(options_.spill);
    file_->Truncate(count_ * sizeof(float) * kNumArrays);
    fs::remove(options_.spill);  // the open file lives on without a name
  }
  AlignedBuffer<float> values;
  for (const Parameter& p : parameters_) {
    const LoadedMatrix loaded = LoadRows(model, p.slice, 0, p.slice.rows);
    GrowBuffer(values, static_cast<int64_t>(p.count));
    for (uint64_t i = 0; i < p.count; ++i) {
      values[i] = LoadAsFloat(p.slice.tensor->dtype, loaded.storage.data(), i);
      if (options_.pure_bf16) values[i] = RoundBf16(values[i]);
    }
    Store(kMaster, p.offset, values.span().first(p.count));
  }
  for (const Array array : {kMoment1, kMoment2, kGradient}) {
    if (!file_) std::fill_n(memory_[array].data(), count_, 0.0f);  // a new file reads as zeros
  }
}

int64_t ParameterStore::lowest_layer() const {
  const auto layers = std::ssize(ranges_) - 1;
  for (int64_t l = 0; l < layers; ++l) {
    if (has_layer(l)) return l;
  }
  return layers;
}

int64_t ParameterStore::highest_layer() const {
  for (int64_t l = std::ssize(ranges_) - 2; l >= 0; --l) {
    if (has_layer(l)) return l;
  }
  return -1;
}

Dtype ParameterStore::DtypeOf(const Parameter& p) const {
  if (options_.pure_bf16) return Dtype::kBF16;
  return options_.dtype.value_or(p.slice.tensor->dtype);
}

float* ParameterStore::Load(Array array, uint64_t first, uint64_t count,
                            AlignedBuffer<float>& scratch) {
  if (!file_) return memory_[array].data() + first;
  GrowBuffer(scratch, static_cast<int64_t>(count));
  const uint64_t at = (static_cast<uint64_t>(array) * count_ + first) * sizeof(float);
  file_->ReadAt(at, std::as_writable_bytes(scratch.span().first(count)));
  return scratch.data();
}

void ParameterStore::Store(Array array, uint64_t first, std::span<const float> values) {
  if (!file_) {
    float* to = memory_[array].data() + first;
    if (to != values.data()) std::copy(values.begin(), values.end(), to);
    return;
  }
  const uint64_t at = (static_cast<uint64_t>(array) * count_ + first) * sizeof(float);
  file_->WriteAt(at, std::as_bytes(values));
}

const LayerWeights& ParameterStore::Substitute(int64_t layer, const LayerWeights& frozen) {
  const auto [first, end] = range(layer);
  if (first == end) return frozen;
  substituted_ = frozen;
  const float* masters = Load(kMaster, first, end - first, layer_masters_);
  uint64_t bytes = 0;
  for (const Parameter& p : parameters_) {
    if (p.layer == layer) bytes += p.count * sizeof(float) + kAlignment;
  }
  if (rounded_.size() < bytes) rounded_ = AlignedBuffer<std::byte>(bytes);
  uint64_t used = 0;
  for (const Parameter& p : parameters_) {
    if (p.layer != layer) continue;
    const float* from = masters + (p.offset - first);
    const Dtype dtype = DtypeOf(p);
    if (std::vector<float>* vector = VectorOf(substituted_, p)) {
      for (uint64_t i = 0; i < p.count; ++i) {
        std::byte stored[sizeof(float)];
        StoreFloat(dtype, from[i], stored, 0);
        (*vector)[i] = LoadAsFloat(dtype, stored, 0);
      }
      continue;
    }
    WeightMatrix& matrix = *MatrixOf(substituted_, p);
    matrix = {static_cast<const std::byte*>(static_cast<const void*>(from)), p.slice.rows,
              p.slice.cols, dtype};
    if (dtype == Dtype::kF32) continue;
    std::byte* out = rounded_.data() + used;
    used += (p.count * 2 + kAlignment - 1) / kAlignment * kAlignment;
    pool_.Run(static_cast<int64_t>((p.count + kPiece - 1) / kPiece), [&](int64_t piece, int) {
      const uint64_t begin = static_cast<uint64_t>(piece) * kPiece;
      const uint64_t stop = std::min(p.count, begin + kPiece);
      for (uint64_t i = begin; i < stop; ++i) StoreFloat(dtype, from[i], out, i);
    });
    matrix.data = out;
  }
  return substituted_;
}

std::vector<float> ParameterStore::FinalNorm(const std::vector<float>& frozen) {
  const auto [first, end] = ranges_.back();
  if (first == end) return frozen;
  std::vector<float> norm(frozen.size());
  const float* masters = Load(kMaster, first, end - first, layer_masters_);
  const Dtype dtype = DtypeOf(parameters_.back());
  for (size_t i = 0; i < norm.size(); ++i) {
    std::byte stored[sizeof(float)];
    StoreFloat(dtype, masters[i], stored, 0);
    norm[i] = LoadAsFloat(dtype, stored, 0);
  }
  return norm;
}

GradientSlots ParameterStore::BeginGradients(int64_t layer) {
  GradientSlots slots;
  const auto [first, end] = range(layer);
  if (first == end) return slots;
  if (file_) GrowBuffer(layer_gradients_, static_cast<int64_t>(end - first));
  float* gradients = file_ ? layer_gradients_.data() : memory_[kGradient].data() + first;
  std::fill_n(gradients, end - first, 0.0f);
  for (const Parameter& p : parameters_) {
    if (p.layer == layer && layer >= 0) SlotOf(slots, p) = gradients + (p.offset - first);
  }
  return slots;
}

float* ParameterStore::FinalNormGradient() {
  const auto [first, end] = ranges_.back();
  if (first == end) return nullptr;
  BeginGradients(-1);
  return file_ ? layer_gradients_.data() : memory_[kGradient].data() + first;
}

void ParameterStore::EndGradients(int64_t layer) {
  const auto [first, end] = range(layer);
  if (!file_ || first == end) return;
  Store(kGradient, first, layer_gradients_.span().first(end - first));
}

double ParameterStore::GradientNorm() {
  double total = 0;
  ForPieces(
      kGradient,
      [&](uint64_t, std::span<float> values) {
        const size_t pieces = (values.size() + kPiece - 1) / kPiece;
        std::vector<double> sums(pieces);
        pool_.Run(static_cast<int64_t>(pieces), [&](int64_t piece, int) {
          double sum = 0;
          const size_t begin = static_cast<size_t>(piece) * kPiece;
          for (size_t i = begin; i < std::min(values.size(), begin + kPiece); ++i) {
            sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
          }
          sums[static_cast<size_t>(piece)] = sum;
        });
        for (const double sum : sums) total += sum;
      },
      false);
  return std::sqrt(total);
}

void ParameterStore::ForPieces(Array array,
                               const std::function<void(uint64_t, std::span<float>)>& body,
                               bool writes) {
  for (uint64_t first = 0; first < count_; first += kPieces) {
    const uint64_t count = std::min(kPieces, count_ - first);
    const std::span<float> values(Load(array, first, count, scratch_[array]), count);
    body(first, values);
    if (writes) Store(array, first, values);
  }
}

void ParameterStore::StepPiece(const AdamWFactors& f, uint64_t count, const float* gradient,
                               float* master, float* m, float* v) {
  if (!options_.pure_bf16) {
    AdamWStep(f, gradient, static_cast<int64_t>(count), master, m, v);
    return;
  }
  // As PyTorch computes on bf16 tensors: each operation in f32, its result rounded.
  for (uint64_t i = 0; i < count; ++i) {
    const float g = RoundBf16(RoundBf16(gradient[i]) * f.gradient_scale);
    float w = RoundBf16(master[i] * f.decay);
    m[i] = RoundBf16(m[i] + f.rest1 * (g - m[i]));
    v[i] = RoundBf16(RoundBf16(v[i] * f.beta2) + f.rest2 * g * g);
    const float denominator =
        RoundBf16(RoundBf16(RoundBf16(std::sqrt(v[i])) / f.root_bias2) + f.epsilon);
    w = RoundBf16(w - f.step_size * (m[i] / denominator));
    master[i] = w;
  }
}

void ParameterStore::Step(const AdamWFactors& factors) {
  for (uint64_t first = 0; first < count_; first += kPieces) {
    const uint64_t count = std::min(kPieces, count_ - first);
    float* at[kNumArrays];
    for (const Array array : {kMaster, kMoment1, kMoment2, kGradient}) {
      at[array] = Load(array, first, count, scratch_[array]);
    }
    pool_.Run(static_cast<int64_t>((count + kPiece - 1) / kPiece), [&](int64_t piece, int) {
      const uint64_t begin = static_cast<uint64_t>(piece) * kPiece;
      StepPiece(factors, std::min(kPiece, count - begin), at[kGradient] + begin,
                at[kMaster] + begin, at[kMoment1] + begin, at[kMoment2] + begin);
    });
    for (const Array array : {kMaster, kMoment1, kMoment2}) {
      Store(array, first, std::span<const float>(at[array], count));
    }
  }
}

uint64_t ParameterStore::MemoryBytes(const std::vector<Parameter>& parameters, bool spilled,
                                     int64_t num_layers) {
  std::vector<uint64_t> layers(static_cast<size_t>(num_layers) + 1);
  uint64_t total = 0, largest = 0, widest = 0;
  for (const Parameter& p : parameters) {
    layers[static_cast<size_t>(p.layer < 0 ? num_layers : p.layer)] += p.count;
    total += p.count;
    widest = std::max(widest, p.count);
  }
  for (const uint64_t count : layers) largest = std::max(largest, count);
  // A layer's rounded weights; spilled: its masters and gradients, and a piece of each array. While
  // masters are read, the largest matrix as stored and as f32.
  const uint64_t rounded = largest * sizeof(float) + widest * 2 * sizeof(float);
  if (!spilled) return total * sizeof(float) * kNumArrays + rounded;
  return rounded + 2 * largest * sizeof(float) + kNumArrays * kPieces * sizeof(float);
}

}  // namespace winnow
