#include "quantize/calibrated_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "base/error.h"
#include "forward/layer_sweep.h"
#include "kernels/elementwise.h"
#include "quantize/input_moments.h"
#include "quantize/layer_tokens.h"
#include "quantize/matrix_rounder.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

// Tokens of the layer whose inner activations stand for the mean of an expert's.
constexpr int64_t kPriorTokens = 256;
constexpr int64_t kHeadRows = 8192;  // of lm_head rounded at a time

class Calibrator {
 public:
  Calibrator(const Model& model, const QuantizePlan& formats, const CalibrateOptions& options,
             const CalibratePlan& plan, const fs::path& spill_file, PackedCheckpointWriter& writer,
             ThreadPool& pool, const JobControl& control)
      : model_(model),
        formats_(formats),
        options_(options),
        writer_(writer),
        pool_(pool),
        control_(control),
        reader_(model, {.prefetch = plan.prefetch}),
        stream_(MakeStream(plan.tokens, model.config().hidden_size,
                           plan.spill ? spill_file : fs::path())),
        sweep_(model, plan.tokens, pool, control, "quantize", options.compute),
        tokens_(model.config(), *stream_, sweep_.tiles(), pool),
        rounder_(pool) {}

  std::vector<CalibratedLayer> Run() {
    const int64_t num_layers = model_.config().num_layers();
    sweep_.SetWork(0, 3 * num_layers * stream_->num_tokens());
    sweep_.Embed(*stream_);
    for (layer_ = 0; layer_ < num_layers; ++layer_) RunLayer(reader_.Get(layer_));
    if (!formats_.lm_head.empty()) RoundHead();
    return std::move(report_);
  }

 private:
  void RunLayer(const LayerWeights& weights) {
    LayerWeights rounded = weights;  // views; those of rounded matrices are replaced
    const LayerFormats& formats = formats_.layers[static_cast<size_t>(layer_)];
    if (!formats.attention.empty()) RoundAttention(weights, formats.attention, rounded);
    for (const SequenceTile& tile : sweep_.tiles()) {
      sweep_.RunAttention(rounded, tile, stream_->Load(tile.first_token, tile.num_tokens));
      stream_->Store(tile.first_token, tile.num_tokens);
      sweep_.Advance(layer_, tile.num_tokens);
    }
    tokens_.Route(layer_, weights, sweep_);
    RoundExperts(weights, formats, rounded);
    if (!formats.shared.empty() && !weights.shared.gate.empty()) {
      RoundWhole(weights.shared, formats.shared, weights.post_attention_norm,
                 PackedMatrix::kSharedGate, rounded.shared);
    }
    if (!formats.dense.empty() && !weights.dense.gate.empty()) {
      RoundWhole(weights.dense, formats.dense, weights.post_attention_norm,
                 PackedMatrix::kDenseGate, rounded.dense);
    }
    for (const SequenceTile& tile : sweep_.tiles()) {
      sweep_.RunFeedForward(rounded, {.layer = layer_, .first_token = tile.first_token},
                            tile.num_tokens, stream_->Load(tile.first_token, tile.num_tokens));
      stream_->Store(tile.first_token, tile.num_tokens);
      sweep_.Advance(layer_, tile.num_tokens);
    }
    kept_.clear();
  }

  RoundingInputs InputsOf(const std::vector<double>& moments, int64_t cols,
                          const PackedFormat& format) const {
    RoundingInputs inputs;
    if (options_.compensated) {
      inputs.factor = FactorInputs(moments, cols, format, options_.damping, pool_);
    } else {
      for (int64_t i = 0; i < cols; ++i) {
        inputs.column_weight.push_back(moments[static_cast<size_t>(i * cols + i)]);
      }
    }
    return inputs;
  }

  void RoundMatrix(const WeightMatrix& w, const PackedFormat& format, const RoundingInputs& inputs,
                   const std::string& name, WeightMatrix& rounded) {
    control_.Poll();
    kept_.push_back(rounder_.Round(w, format, inputs, fmt::format("layer {}: {}", layer_, name)));
    rounded = {kept_.back().data(), w.rows, w.cols, Dtype::kU8, 0, format};
  }

  void RoundAttention(const LayerWeights& weights, const PackedFormat& format,
                      LayerWeights& rounded) {
    const int64_t h = model_.config().hidden_size, width = model_.config().query_width();
    tokens_.WeighByStream();
    InputMoments normed(h);
    tokens_.ForNormedRows(tokens_.all(), weights.input_norm,
                          [&](const float* x, const float* weight, int64_t n) {
                            control_.Poll();
                            normed.Add(x, weight, n, pool_);
                          });
    RoundingInputs inputs = InputsOf(normed.TakeBlended(nullptr, 0), h, format);
    const auto round = [&](PackedMatrix which, const char* name, const WeightMatrix& w,
                           WeightMatrix& to) {
      RoundMatrix(w, format, inputs, name, to);
      writer_.WriteMatrix(layer_, which, Bytes(to));
    };
    round(PackedMatrix::kQ, "q", weights.q, rounded.q);
    round(PackedMatrix::kK, "k", weights.k, rounded.k);
    round(PackedMatrix::kV, "v", weights.v, rounded.v);
    // What the output projection sees of the rounded ones; the stream itself stays.
    InputMoments attended(width);
    std::vector<float> hidden;
    for (const SequenceTile& tile : sweep_.tiles()) {
      const float* stream = stream_->Load(tile.first_token, tile.num_tokens);
      hidden.assign(stream, stream + tile.num_tokens * h);
      sweep_.RunAttention(rounded, tile, hidden.data());
      for (int64_t first = 0; first < tile.num_tokens; first += kMomentRows) {
        attended.Add(sweep_.attended() + first * width,
                     tokens_.all().weights.data() + tile.first_token + first,
                     std::min(kMomentRows, tile.num_tokens - first), pool_);
      }
    }
    inputs = InputsOf(attended.TakeBlended(nullptr, 0), width, format);
    round(PackedMatrix::kO, "o", weights.o, rounded.o);
  }

  // Gate, up and down of one SwiGLU on its tokens. `prior` of the layer's inputs and the tokens it
  // is from, or null.
  void RoundFeedForward(const FeedForwardWeights& weights, const PackedFormat& format,
                        const WeightedTokens& tokens, const std::vector<float>& norm,
                        const InputMoments* prior, const WeightedTokens* prior_tokens,
                        const std::string& name, FeedForwardWeights& rounded) {
    const int64_t h = model_.config().hidden_size, width = weights.width();
    {
      InputMoments own(h);
      tokens_.ForNormedRows(tokens, norm, [&](const float* x, const float* weight, int64_t n) {
        control_.Poll();
        own.Add(x, weight, n, pool_);
      });
      RoundingInputs inputs = InputsOf(own.TakeBlended(prior, options_.prior_tokens), h, format);
      RoundMatrix(weights.gate, format, inputs, name + " gate", rounded.gate);
      RoundMatrix(weights.up, format, inputs, name + " up", rounded.up);
    }
    inner_.resize(static_cast<size_t>(kMomentRows * width));
    const auto gather = [&](const WeightedTokens& from, InputMoments& to) {
      tokens_.ForNormedRows(from, norm, [&](const float* x, const float* weight, int64_t n) {
        sweep_.RunInner(rounded, x, n, inner_.data(), width);
        to.Add(inner_.data(), weight, n, pool_);
      });
    };
    InputMoments own(width);
    gather(tokens, own);
    std::optional<InputMoments> mean;
    if (prior_tokens != nullptr) gather(*prior_tokens, mean.emplace(width));
    RoundingInputs inputs =
        InputsOf(own.TakeBlended(mean ? &*mean : nullptr, options_.prior_tokens), width, format);
    RoundMatrix(weights.down, format, inputs, name + " down", rounded.down);
  }

  void RoundExperts(const LayerWeights& weights, const LayerFormats& formats,
                    LayerWeights& rounded) {
    const int64_t num_experts = weights.num_experts();
    std::optional<InputMoments> prior;
    WeightedTokens spaced;
    if (!weights.router.empty()) {
      CalibratedLayer report{.layer = static_cast<int32_t>(layer_),
                             .fewest_tokens = stream_->num_tokens()};
      for (int64_t e = 0; e < num_experts; ++e) {
        const auto seen = static_cast<int64_t>(tokens_.expert(e).tokens.size());
        report.unseen_experts += seen == 0 ? 1 : 0;
        report.fewest_tokens = std::min(report.fewest_tokens, seen);
      }
      report_.push_back(report);
      spaced = tokens_.Spaced(kPriorTokens);
      prior.emplace(model_.config().hidden_size);
      tokens_.ForNormedRows(tokens_.all(), weights.post_attention_norm,
                            [&](const float* x, const float* weight, int64_t n) {
                              control_.Poll();
                              prior->Add(x, weight, n, pool_);
                            });
    }
    int64_t shown = 0;  // tokens of progress
    for (int64_t e = 0; e < num_experts; ++e) {
      const auto at = static_cast<size_t>(e);
      const PackedFormat format = formats.Expert(at);
      if (!format.empty()) {
        RoundFeedForward(weights.experts[at], format, tokens_.expert(e),
                         weights.post_attention_norm, prior ? &*prior : nullptr,
                         prior ? &spaced : nullptr, fmt::format("expert {}", e),
                         rounded.experts[at]);
        const FeedForwardWeights& done = rounded.experts[at];
        writer_.WriteExpert(layer_, e, Bytes(done.gate), Bytes(done.up), Bytes(done.down));
      }
      const int64_t until = stream_->num_tokens() * (e + 1) / num_experts;
      sweep_.Advance(layer_, until - shown);
      shown = until;
    }
    if (num_experts == 0) sweep_.Advance(layer_, stream_->num_tokens());
  }

  // A SwiGLU that every token uses; `gate` of the three matrices' names, which follow each other.
  void RoundWhole(const FeedForwardWeights& weights, const PackedFormat& format,
                  const std::vector<float>& norm, PackedMatrix gate, FeedForwardWeights& rounded) {
    const bool shared = gate == PackedMatrix::kSharedGate;
    RoundFeedForward(weights, format, tokens_.all(), norm, nullptr, nullptr,
                     shared ? "shared expert's" : "dense", rounded);
    writer_.WriteMatrix(layer_, gate, Bytes(rounded.gate));
    writer_.WriteMatrix(layer_, shared ? PackedMatrix::kSharedUp : PackedMatrix::kDenseUp,
                        Bytes(rounded.up));
    writer_.WriteMatrix(layer_, shared ? PackedMatrix::kSharedDown : PackedMatrix::kDenseDown,
                        Bytes(rounded.down));
  }

  static std::span<const std::byte> Bytes(const WeightMatrix& w) {
    return {w.data, static_cast<size_t>(w.bytes())};
  }

  void RoundHead() {
    const int64_t h = model_.config().hidden_size;
    const std::vector<float> norm = LoadVector(model_, model_.final_norm());
    InputMoments normed(h);
    // After the final norm an error counts by itself: logits are not normed again.
    WeightedTokens all = tokens_.all();
    std::fill(all.weights.begin(), all.weights.end(), 1.0f);
    tokens_.ForNormedRows(all, norm, [&](const float* x, const float* weight, int64_t n) {
      control_.Poll();
      normed.Add(x, weight, n, pool_);
    });
    RoundingInputs inputs = InputsOf(normed.TakeBlended(nullptr, 0), h, formats_.lm_head);
    const TensorSlice& slice = model_.lm_head();
    for (int64_t first = 0; first < slice.rows; first += kHeadRows) {
      control_.Poll();
      const LoadedMatrix rows =
          LoadRows(model_, slice, first, std::min(kHeadRows, slice.rows - first));
      const AlignedBuffer<std::byte> bytes =
          rounder_.Round(rows.matrix, formats_.lm_head, inputs, "lm_head");
      writer_.WriteRows(-1, PackedMatrix::kLmHead, first, bytes.span());
    }
  }

  const Model& model_;
  const QuantizePlan& formats_;
  const CalibrateOptions& options_;
  PackedCheckpointWriter& writer_;
  ThreadPool& pool_;
  const JobControl& control_;
  LayerReader reader_;
  std::unique_ptr<HiddenStates> stream_;
  LayerSweep sweep_;
  LayerTokens tokens_;
  MatrixRounder rounder_;
  int64_t layer_ = 0;
  std::vector<AlignedBuffer<std::byte>> kept_;  // rounded matrices of the layer
  std::vector<float> inner_;
  std::vector<CalibratedLayer> report_;
};

// What the plan rounds in a layer, packed, and the widest matrix of all layers.
struct Sizes {
  uint64_t packed = 0;
  int64_t cols = 0;
  int64_t width = 0;  // of an expert or other SwiGLU
};

Sizes SizesOf(const Model& model, const QuantizePlan& formats) {
  Sizes sizes;
  if (!formats.lm_head.empty()) sizes.cols = model.lm_head().cols;
  for (size_t l = 0; l < formats.layers.size(); ++l) {
    const LayerSlices& slices = model.layers()[l];
    const LayerFormats& layer = formats.layers[l];
    uint64_t packed = 0;
    const auto add = [&](const TensorSlice& slice, const PackedFormat& format) {
      if (format.empty() || !slice.exists()) return;
      packed += PackedBytes(format, slice.rows, slice.cols);
      sizes.cols = std::max(sizes.cols, slice.cols);
    };
    const auto add_all = [&](const FeedForwardSlices& part, const PackedFormat& format) {
      add(part.gate, format);
      add(part.up, format);
      add(part.down, format);
      sizes.width = std::max(sizes.width, part.gate.rows);
    };
    for (size_t e = 0; e < slices.experts.size(); ++e) add_all(slices.experts[e], layer.Expert(e));
    add_all(slices.shared, layer.shared);
    add_all(slices.dense, layer.dense);
    for (const TensorSlice* slice : {&slices.q, &slices.k, &slices.v, &slices.o}) {
      add(*slice, layer.attention);
    }
    sizes.packed = std::max(sizes.packed, packed);
  }
  return sizes;
}

}  // namespace

CalibratePlan PlanCalibrate(const Model& model, const std::vector<SourceBlocks>& sources,
                            const QuantizePlan& formats, const CalibrateOptions& options,
                            int num_threads) {
  CalibratePlan plan;
  for (const SourceBlocks& source : sources) {
    plan.tokens.AppendAll(source.sequences.ids, source.sequences.offsets);
  }
  const ModelConfig& config = model.config();
  CheckTokenIds(plan.tokens.ids, config);
  if (plan.tokens.num_tokens() == 0) {
    throw UsageError("there is no calibration text", "give --calib FILE that has some");
  }
  const int64_t n = plan.tokens.num_tokens(), h = config.hidden_size;
  const int64_t tile = LargestTile(plan.tokens);
  const Sizes sizes = SizesOf(model, formats);
  const auto square = static_cast<uint64_t>(sizes.cols) * static_cast<uint64_t>(sizes.cols);
  for (const auto& [prefetch, spill] :
       {std::pair(true, false), std::pair(false, false), std::pair(false, true)}) {
    plan.prefetch = prefetch;
    plan.spill = spill;
    plan.memory = {};
    plan.memory.Add("program", kProgramBytes);
    plan.memory.Add(
        prefetch ? "weights of two layers" : "weights of one layer",
        (prefetch ? 2 : 1) * LayerReader::LargestLayerBytes(model, {.prefetch = prefetch}));
    plan.memory.Add("rounded matrices of a layer", sizes.packed);
    plan.memory.Add(spill ? "stream, one tile (the rest on disk)" : "stream",
                    HiddenStates::Bytes(spill ? tile : n, h));
    plan.memory.Add("tokens of experts", LayerTokens::Bytes(config, n, tile));
    plan.memory.Add("moments of a matrix's inputs",
                    InputMoments::Bytes(sizes.cols) + InputMoments::Bytes(h));
    // Doubles in the order of rounding, their factor, and the factor in f32.
    plan.memory.Add("inverse of the moments", options.compensated ? 20 * square : 0);
    plan.memory.Add("rows of a matrix being rounded", MatrixRounder::Bytes(sizes.cols));
    if (!formats.lm_head.empty()) {
      plan.memory.Add("rows of lm_head", static_cast<uint64_t>(kHeadRows * h) * 2 * sizeof(float));
    }
    plan.memory.Add("work of a tile",
                    LayerSweep::ScratchBytes(model, plan.tokens, false, num_threads) +
                        HiddenStates::Bytes(tile, h) +
                        static_cast<uint64_t>(kMomentRows * sizes.width) * 4 * sizeof(float));
    if (plan.memory.total_bytes() <= options.memory_budget_bytes) return plan;
  }
  plan.memory.Require(options.memory_budget_bytes);
  return plan;
}

std::vector<CalibratedLayer> RunCalibrate(const Model& model, const QuantizePlan& formats,
                                          const CalibrateOptions& options,
                                          const CalibratePlan& plan, const fs::path& spill_file,
                                          PackedCheckpointWriter& writer, ThreadPool& pool,
                                          const JobControl& control) {
  return Calibrator(model, formats, options, plan, spill_file, writer, pool, control).Run();
}

}  // namespace winnow
