#include "train/batch_pass.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace winnow {

void StreamStore::Resize(int64_t levels, int64_t tokens, int64_t hidden) {
  tokens_ = tokens;
  hidden_ = hidden;
  if (spill_.empty()) {
    GrowBuffer(memory_, levels * tokens * hidden);
    return;
  }
  if (file_) return;
  file_ = File::Create(spill_);
  fs::remove(spill_);  // the open file lives on without a name
}

float* StreamStore::Place(int64_t level, int64_t first, int64_t count, int slot) {
  if (!file_) return memory_.data() + (level * tokens_ + first) * hidden_;
  GrowBuffer(slots_[slot], count * hidden_);
  return slots_[slot].data();
}

float* StreamStore::Load(int64_t level, int64_t first, int64_t count, int slot) {
  float* values = Place(level, first, count, slot);
  if (!file_) return values;
  const auto at = static_cast<uint64_t>((level * tokens_ + first) * hidden_) * sizeof(float);
  file_->ReadAt(at,
                std::as_writable_bytes(std::span(values, static_cast<size_t>(count * hidden_))));
  return values;
}

void StreamStore::Store(int64_t level, int64_t first, int64_t count, const float* values) {
  if (!file_) return;
  const auto at = static_cast<uint64_t>((level * tokens_ + first) * hidden_) * sizeof(float);
  file_->WriteAt(at, std::as_bytes(std::span(values, static_cast<size_t>(count * hidden_))));
}

struct BatchPass::Teacher {
  Teacher(const Model& teacher, const PassOptions& options, ThreadPool& pool)
      : model(teacher),
        reader(teacher, {.prefetch = options.prefetch, .keep_resident = options.resident}),
        layer(teacher.config(), pool, options.compute),
        stream(options.spill_folder.empty() ? fs::path{} : options.spill_folder / "teacher.spill"),
        norm(LoadVector(teacher, teacher.final_norm())) {}
  const Model& model;
  LayerReader reader;
  LayerGradient layer;
  StreamStore stream;
  LayerTape tape;
  std::vector<float> norm;
  LoadedMatrix lm_head;
};

namespace {

fs::path SpillPath(const PassOptions& options, const char* name) {
  return options.spill_folder.empty() ? fs::path{} : options.spill_folder / name;
}

}  // namespace

BatchPass::BatchPass(const Model& model, ParameterStore& store, const PassOptions& options,
                     ThreadPool& pool, const JobControl& control)
    : model_(model),
      store_(store),
      options_(options),
      pool_(pool),
      control_(control),
      reader_(model, {.prefetch = options.prefetch, .keep_resident = options.resident}),
      layer_(model.config(), pool, options.compute),
      output_(model.config().hidden_size, model.config().vocab_size, pool),
      lowest_(store.lowest_layer()),
      highest_(store.highest_layer()),
      needs_head_(options.distill != Distill::kLayers || options.distill_weight < 1),
      frozen_norm_(LoadVector(model, model.final_norm())),
      streams_(SpillPath(options, "streams.spill")),
      injected_(SpillPath(options, "targets.spill")) {
  if (options.teacher != nullptr)
    teacher_ = std::make_unique<Teacher>(*options.teacher, options, pool);
  int64_t level = 0;
  for (int64_t l = 0; l < model.config().num_layers(); ++l) {
    const bool compared = options.distill == Distill::kLayers && store.has_layer(l);
    injected_level_.push_back(compared ? level++ : -1);
  }
}

BatchPass::~BatchPass() = default;

void BatchPass::Cut(const TrainBatch& batch) {
  const int64_t rows = options_.micro_batch > 0 ? options_.micro_batch : batch.num_rows();
  parts_.clear();
  int64_t token = 0;
  for (int64_t first = 0; first < batch.num_rows(); first += rows) {
    Part part;
    part.first_token = token;
    for (int64_t r = first; r < std::min(batch.num_rows(), first + rows); ++r) {
      part.batch.lengths.push_back(batch.lengths[static_cast<size_t>(r)]);
      token += batch.lengths[static_cast<size_t>(r)];
    }
    const auto cut = [&](const auto& all, auto& out) {
      if (all.empty()) return;
      out.assign(all.begin() + part.first_token, all.begin() + token);
    };
    cut(batch.ids, part.batch.ids);
    cut(batch.targets, part.batch.targets);
    cut(batch.weights, part.batch.weights);
    cut(batch.key_mask, part.batch.key_mask);
    parts_.push_back(std::move(part));
  }
}

PassResult BatchPass::Run(const TrainBatch& batch, bool gradients) {
  const int64_t h = model_.config().hidden_size;
  Cut(batch);
  tokens_ = batch.num_tokens();
  result_ = {};
  result_.tokens = tokens_;
  for (const float weight : batch.weights) result_.weight += static_cast<double>(weight);
  if (!(result_.weight > 0)) {
    throw UsageError("a step has no token that counts", "give longer rows (--block)");
  }
  compared_tokens_ = static_cast<double>(
      batch.key_mask.empty() ? tokens_
                             : std::count(batch.key_mask.begin(), batch.key_mask.end(), 1));
  balance_ = {options_.balance_alpha, options_.balance_by_row, batch.num_rows(), tokens_};
  streams_.Resize(gradients ? std::max<int64_t>(0, num_layers() - lowest_) + 1 : 1, tokens_, h);
  injected_.Resize(std::count_if(injected_level_.begin(), injected_level_.end(),
                                 [](int64_t level) { return level >= 0; }),
                   tokens_, h);
  for (const Part& part : parts_) {
    const int64_t count = part.batch.num_tokens();
    float* stream = streams_.Place(0, part.first_token, count, 0);
    LoadEmbeddings(model_, part.batch.ids, stream);
    streams_.Store(0, part.first_token, count, stream);
    if (teacher_ == nullptr) continue;
    teacher_->stream.Resize(1, tokens_, teacher_->model.config().hidden_size);
    float* other = teacher_->stream.Place(0, part.first_token, count, 0);
    LoadEmbeddings(teacher_->model, part.batch.ids, other);
    teacher_->stream.Store(0, part.first_token, count, other);
  }
  Forward(gradients);
  GrowBuffer(d_stream_, gradients ? tokens_ * h : 0);
  if (needs_head_) {
    Output(gradients);
  } else if (gradients) {
    std::fill_n(d_stream_.data(), tokens_ * h, 0.0f);
  }
  if (gradients) Backward();
  if (!std::isfinite(result_.loss)) {
    throw ModelError("the loss is not finite",
                     "a smaller --lr may help; winnow doctor MODEL finds NaN and Inf in weights");
  }
  return result_;
}

void BatchPass::Forward(bool gradients) {
  const int64_t layers = num_layers();
  const size_t kept =
      options_.keep_tapes && gradients
          ? static_cast<size_t>(std::max<int64_t>(0, layers - lowest_)) * parts_.size()
          : 1;
  if (tapes_.size() < kept) tapes_.resize(kept);
  for (int64_t layer = 0; layer < layers; ++layer) {
    AdvanceTeacher(layer);
    // Behind the last layer comes backward, which begins with it.
    const bool last = layer + 1 == layers;
    const LayerWeights& read = reader_.Get(layer, !last ? layer + 1 : gradients ? layer - 1 : 0);
    ForwardLayer(layer, store_.Substitute(layer, read), gradients);
  }
  const int64_t teacher_layers = teacher_ != nullptr && options_.distill == Distill::kLogits
                                     ? teacher_->model.config().num_layers()
                                     : 0;
  for (int64_t layer = layers; layer < teacher_layers; ++layer) AdvanceTeacher(layer);
}

void BatchPass::ForwardLayer(int64_t layer, const LayerWeights& weights, bool gradients) {
  const int64_t from = LevelOf(layer, gradients), to = LevelOf(layer + 1, gradients);
  for (size_t p = 0; p < parts_.size(); ++p) {
    control_.Poll();
    const Part& part = parts_[p];
    const int64_t count = part.batch.num_tokens();
    const bool keeps = options_.keep_tapes && gradients && layer >= lowest_;
    LayerTape& tape = tapes_[keeps ? static_cast<size_t>(layer - lowest_) * parts_.size() + p : 0];
    const float* before = streams_.Load(from, part.first_token, count, 0);
    float* after = streams_.Place(to, part.first_token, count, from == to ? 0 : 1);
    layer_.Forward(weights, part.batch, before, after, tape);
    streams_.Store(to, part.first_token, count, after);
    if (injected_level_[static_cast<size_t>(layer)] >= 0) {
      result_.loss += options_.distill_weight * CompareLayer(layer, part, after, gradients);
    }
  }
}

void BatchPass::AdvanceTeacher(int64_t layer) {
  if (teacher_ == nullptr || layer >= teacher_->model.config().num_layers()) return;
  const int64_t next = layer + 1 < teacher_->model.config().num_layers() ? layer + 1 : 0;
  const LayerWeights& weights = teacher_->reader.Get(layer, next);
  for (const Part& part : parts_) {
    control_.Poll();
    const int64_t count = part.batch.num_tokens();
    float* stream = teacher_->stream.Load(0, part.first_token, count, 0);
    teacher_->layer.Forward(weights, part.batch, stream, stream, teacher_->tape);
    teacher_->stream.Store(0, part.first_token, count, stream);
  }
}

double BatchPass::CompareLayer(int64_t layer, const Part& part, const float* after,
                               bool gradients) {
  const int64_t h = model_.config().hidden_size, count = part.batch.num_tokens();
  const int64_t level = injected_level_[static_cast<size_t>(layer)];
  const float* target = teacher_->stream.Load(0, part.first_token, count, 0);
  float* gradient = injected_.Place(level, part.first_token, count, 0);
  std::vector<double> errors(static_cast<size_t>(count));
  pool_.Run(count, [&](int64_t t, int) {
    const float* a = after + t * h;
    const float* b = target + t * h;
    float* out = gradient + t * h;
    const bool hidden =
        !part.batch.key_mask.empty() && part.batch.key_mask[static_cast<size_t>(t)] == 0;
    double norm = 0, error = 0;
    for (int64_t i = 0; i < h; ++i) {
      const double value = static_cast<double>(b[i]);
      const double difference = static_cast<double>(a[i]) - value;
      norm += value * value;
      error += difference * difference;
    }
    const double scale = hidden || !(norm > 0) ? 0 : 1 / (norm * compared_tokens_);
    errors[static_cast<size_t>(t)] = error * scale;
    const auto factor = static_cast<float>(2 * scale * options_.distill_weight);
    for (int64_t i = 0; i < h; ++i) out[i] = factor * (a[i] - b[i]);
  });
  if (gradients) injected_.Store(level, part.first_token, count, gradient);
  double total = 0;
  for (const double error : errors) total += error;
  return total;
}

void BatchPass::Output(bool gradients) {
  const auto head_of = [](const Model& model, std::vector<float> norm, LoadedMatrix& loaded) {
    if (loaded.storage.empty()) {
      loaded = LoadRows(model, model.lm_head(), 0, model.lm_head().rows);
    }
    return OutputHead{std::move(norm), loaded.matrix, model.config().rms_norm_eps};
  };
  const OutputHead head = head_of(model_, store_.FinalNorm(frozen_norm_), lm_head_);
  std::optional<OutputHead> teacher;
  const bool distils = options_.distill == Distill::kLogits;
  if (distils) teacher = head_of(teacher_->model, teacher_->norm, teacher_->lm_head);
  const int64_t h = model_.config().hidden_size;
  const int64_t level = LevelOf(num_layers(), gradients);
  // Of the whole step's loss: layer errors are no part of this one.
  const double entropy_share =
      options_.distill == Distill::kNone ? 1.0 : 1 - options_.distill_weight;
  LossSums sums;
  float* d_norm = gradients ? store_.FinalNormGradient() : nullptr;
  for (const Part& part : parts_) {
    control_.Poll();
    const int64_t count = part.batch.num_tokens();
    OutputLossCall call;
    call.batch = &part.batch;
    call.stream = streams_.Load(level, part.first_token, count, 0);
    if (distils) {
      call.teacher = &*teacher;
      call.teacher_stream = teacher_->stream.Load(0, part.first_token, count, 0);
      call.divergence_share = options_.distill_weight;
    }
    call.scale = (distils ? 1.0 : entropy_share) / result_.weight;
    call.d_stream = gradients ? d_stream_.data() + part.first_token * h : nullptr;
    call.d_norm = d_norm;
    const LossSums part_sums = output_.Run(head, call);
    sums.cross_entropy += part_sums.cross_entropy;
    sums.divergence += part_sums.divergence;
  }
  if (gradients) store_.EndGradients(-1);
  result_.cross_entropy = sums.cross_entropy / result_.weight;
  result_.loss += entropy_share * result_.cross_entropy;
  if (distils) result_.loss += options_.distill_weight * sums.divergence / result_.weight;
  if (options_.resident) return;
  lm_head_ = {};
  if (teacher_ != nullptr) teacher_->lm_head = {};
}

void BatchPass::InjectLayer(int64_t layer, const Part& part, float* d_stream) {
  const int64_t level = injected_level_[static_cast<size_t>(layer)];
  if (level < 0) return;
  const int64_t h = model_.config().hidden_size, count = part.batch.num_tokens();
  const float* gradient = injected_.Load(level, part.first_token, count, 0);
  for (int64_t i = 0; i < count * h; ++i) d_stream[i] += gradient[i];
}

void BatchPass::Backward() {
  const int64_t h = model_.config().hidden_size;
  for (int64_t layer = num_layers() - 1; layer >= lowest_; --layer) {
    const LayerWeights& read = reader_.Get(layer, layer > lowest_ ? layer - 1 : 0);
    const LayerWeights& weights = store_.Substitute(layer, read);
    const GradientSlots slots = store_.BeginGradients(layer);
    for (size_t p = 0; p < parts_.size(); ++p) {
      control_.Poll();
      const Part& part = parts_[p];
      float* d_stream = d_stream_.data() + part.first_token * h;
      InjectLayer(layer, part, d_stream);
      const float* before =
          streams_.Load(LevelOf(layer, true), part.first_token, part.batch.num_tokens(), 0);
      LayerTape& tape =
          tapes_[options_.keep_tapes ? static_cast<size_t>(layer - lowest_) * parts_.size() + p
                                     : 0];
      if (!options_.keep_tapes) layer_.Forward(weights, part.batch, before, nullptr, tape);
      layer_.Backward(weights, part.batch, before, tape, balance_, d_stream, slots,
                      layer > lowest_);
    }
    store_.EndGradients(layer);
  }
}

}  // namespace winnow
