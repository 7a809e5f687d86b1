#include "quantize/expert_errors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "base/error.h"
#include "base/units.h"
#include "forward/layer_sweep.h"
#include "kernels/accumulate.h"
#include "kernels/elementwise.h"
#include "quantize/input_moments.h"
#include "quantize/layer_tokens.h"
#include "quantize/matrix_rounder.h"
#include "quantize/packed_layout.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kSampleTokens = 512;  // of an expert, at most kMomentRows

struct SampledTokens : WeightedTokens {
  double scale = 1;  // of the weights, to stand for all
};

// At most kSampleTokens of an expert's tokens, evenly spaced, their weights scaled up to stand for
// all. An expert without tokens is judged by the layer's, as if one of them were its own.
SampledTokens Sample(const LayerTokens& tokens, int64_t expert) {
  const WeightedTokens& all = tokens.expert(expert);
  const auto count = static_cast<int64_t>(all.tokens.size());
  if (count == 0) {
    SampledTokens spaced{tokens.Spaced(kSampleTokens)};
    spaced.scale = 1 / static_cast<double>(spaced.weights.size());
    for (float& weight : spaced.weights) weight /= static_cast<float>(spaced.weights.size());
    return spaced;
  }
  SampledTokens sample;
  const int64_t taken = std::min(count, kSampleTokens);
  sample.scale = static_cast<double>(count) / static_cast<double>(taken);
  for (int64_t i = 0; i < taken; ++i) {
    const auto at = static_cast<size_t>(i * count / taken);
    sample.tokens.push_back(all.tokens[at]);
    sample.weights.push_back(all.weights[at] * static_cast<float>(count) /
                             static_cast<float>(taken));
  }
  return sample;
}

// sum_t weight_t x_ti^2 by column.
std::vector<double> ColumnWeights(const std::vector<float>& x, const std::vector<float>& weight,
                                  int64_t cols) {
  std::vector<double> sums(static_cast<size_t>(cols), 0.0);
  for (size_t row = 0; row < weight.size(); ++row) {
    for (size_t i = 0; i < sums.size(); ++i) {
      const auto value = static_cast<double>(x[row * sums.size() + i]);
      sums[i] += static_cast<double>(weight[row]) * value * value;
    }
  }
  return sums;
}

class ErrorMeter {
 public:
  ErrorMeter(const Model& model, const std::vector<PackedFormat>& candidates,
             const CalibrateOptions& options, const CalibratePlan& plan, const fs::path& spill_file,
             ThreadPool& pool, const JobControl& control)
      : model_(model),
        candidates_(candidates),
        control_(control),
        relative_to_result_(options.relative_to_result),
        reader_(model, {.prefetch = plan.prefetch}),
        stream_(MakeStream(plan.tokens, model.config().hidden_size,
                           plan.spill ? spill_file : fs::path())),
        sweep_(model, plan.tokens, pool, control, "measure", options.compute),
        tokens_(model.config(), *stream_, sweep_.tiles(), pool),
        rounder_(pool) {}

  std::vector<LayerErrors> Run() {
    const int64_t num_layers = model_.config().num_layers();
    sweep_.SetWork(0, 2 * num_layers * stream_->num_tokens());
    sweep_.Embed(*stream_);
    std::vector<LayerErrors> all;
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const LayerWeights& weights = reader_.Get(layer);
      for (const SequenceTile& tile : sweep_.tiles()) {
        sweep_.RunAttention(weights, tile, stream_->Load(tile.first_token, tile.num_tokens));
        stream_->Store(tile.first_token, tile.num_tokens);
        sweep_.Advance(layer, tile.num_tokens);
      }
      if (!weights.router.empty()) all.push_back(MeasureLayer(layer, weights));
      for (const SequenceTile& tile : sweep_.tiles()) {
        sweep_.RunFeedForward(weights, {.layer = layer, .first_token = tile.first_token},
                              tile.num_tokens, stream_->Load(tile.first_token, tile.num_tokens));
        stream_->Store(tile.first_token, tile.num_tokens);
        sweep_.Advance(layer, tile.num_tokens);
      }
    }
    return all;
  }

 private:
  LayerErrors MeasureLayer(int64_t layer, const LayerWeights& weights) {
    LayerErrors result;
    result.layer = static_cast<int32_t>(layer);
    tokens_.Route(layer, weights, sweep_);
    for (int64_t e = 0; e < weights.num_experts(); ++e) {
      result.error.push_back(MeasureExpert(weights.experts[static_cast<size_t>(e)],
                                           Sample(tokens_, e), weights.post_attention_norm,
                                           fmt::format("layer {}: expert {}", layer, e)));
    }
    return result;
  }

  std::vector<double> MeasureExpert(const FeedForwardWeights& expert, const SampledTokens& sample,
                                    const std::vector<float>& norm, const std::string& name) {
    const int64_t h = model_.config().hidden_size, width = expert.width();
    const auto n = static_cast<int64_t>(sample.tokens.size());
    std::vector<float> x, inner(static_cast<size_t>(n * width)), intact(static_cast<size_t>(n * h)),
        rounded(intact.size());
    tokens_.ForNormedRows(sample, norm, [&](const float* rows, const float*, int64_t count) {
      x.insert(x.end(), rows, rows + count * h);
    });
    sweep_.RunExpert(expert, x.data(), n, intact.data());
    sweep_.RunInner(expert, x.data(), n, inner.data(), width);
    RoundingInputs in, down;
    in.column_weight = ColumnWeights(x, sample.weights, h);
    down.column_weight = ColumnWeights(inner, sample.weights, width);
    std::vector<double> errors;
    for (const PackedFormat& format : candidates_) {
      control_.Poll();
      const auto round = [&](const WeightMatrix& w, const RoundingInputs& inputs) {
        return rounder_.Round(w, format, inputs, name);
      };
      const AlignedBuffer<std::byte> gate = round(expert.gate, in), up = round(expert.up, in),
                                     out = round(expert.down, down);
      const auto view = [&](const WeightMatrix& w, const AlignedBuffer<std::byte>& bytes) {
        return WeightMatrix{bytes.data(), w.rows, w.cols, Dtype::kU8, 0, format};
      };
      sweep_.RunExpert({view(expert.gate, gate), view(expert.up, up), view(expert.down, out)},
                       x.data(), n, rounded.data());
      errors.push_back(ErrorOf(sample, intact, rounded));
    }
    return errors;
  }

  // Sum over tokens of weight * |rounded - intact|^2, outputs [n, hidden]. The stream behind the
  // layer is taken as the one before it and this expert's share, at right angles: a first token's
  // output may be a thousand times the stream it is added to.
  double ErrorOf(const SampledTokens& sample, const std::vector<float>& intact,
                 const std::vector<float>& rounded) const {
    const auto h = static_cast<size_t>(model_.config().hidden_size);
    double error = 0;
    for (size_t t = 0; t < sample.weights.size(); ++t) {
      double difference = 0, square = 0;
      for (size_t i = t * h; i < (t + 1) * h; ++i) {
        const auto d = static_cast<double>(rounded[i] - intact[i]);
        difference += d * d;
        square += static_cast<double>(intact[i]) * static_cast<double>(intact[i]);
      }
      const auto weight = static_cast<double>(sample.weights[t]);
      const double behind = relative_to_result_ ? 1 + weight / sample.scale * square : 1;
      error += weight * difference / behind;
    }
    return error;
  }

  const Model& model_;
  const std::vector<PackedFormat>& candidates_;
  const JobControl& control_;
  const bool relative_to_result_;
  LayerReader reader_;
  std::unique_ptr<HiddenStates> stream_;
  LayerSweep sweep_;
  LayerTokens tokens_;
  MatrixRounder rounder_;
};

// ||W - Q||^2 / ||W||^2 of a matrix in each format.
std::vector<double> RelativeErrors(const WeightMatrix& w,
                                   const std::vector<PackedFormat>& candidates,
                                   MatrixRounder& rounder, const std::string& name,
                                   ThreadPool& pool) {
  std::vector<float> values(static_cast<size_t>(w.rows * w.cols));
  pool.Run(w.rows, [&](int64_t row, int) { WidenRow(w, row, values.data() + row * w.cols); });
  double absolute = 0, square = 0;
  AccumulateMoments(w, &absolute, &square);
  std::vector<double> errors;
  for (const PackedFormat& format : candidates) {
    const AlignedBuffer<std::byte> bytes = rounder.Round(w, format, {}, name);
    const double error =
        RoundingError(values.data(), w.rows, w.cols, format, {}, bytes.data(), pool);
    errors.push_back(square > 0 ? error / square : 0);
  }
  return errors;
}

}  // namespace

std::vector<LayerErrors> MeasureExpertErrors(const Model& model,
                                             const std::vector<PackedFormat>& candidates,
                                             const CalibrateOptions& options,
                                             const CalibratePlan& plan, const fs::path& spill_file,
                                             ThreadPool& pool, const JobControl& control) {
  return ErrorMeter(model, candidates, options, plan, spill_file, pool, control).Run();
}

std::vector<LayerErrors> WeightErrors(const Model& model,
                                      const std::vector<PackedFormat>& candidates,
                                      const std::vector<std::vector<double>>& use, ThreadPool& pool,
                                      const JobControl& control) {
  LayerReader reader(model, {.prefetch = false});
  MatrixRounder rounder(pool);
  std::vector<LayerErrors> all;
  const int64_t num_layers = model.config().num_layers();
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    if (!model.config().layers[static_cast<size_t>(layer)].is_moe) continue;
    const LayerWeights& weights = reader.Get(layer);
    LayerErrors result;
    result.layer = static_cast<int32_t>(layer);
    const std::vector<double>& shares = use[all.size()];
    for (size_t e = 0; e < weights.experts.size(); ++e) {
      control.Poll();
      std::vector<double> errors(candidates.size(), 0.0);
      const FeedForwardWeights& expert = weights.experts[e];
      for (const WeightMatrix* w : {&expert.gate, &expert.up, &expert.down}) {
        const std::vector<double> relative = RelativeErrors(
            *w, candidates, rounder, fmt::format("layer {}: expert {}", layer, e), pool);
        for (size_t c = 0; c < errors.size(); ++c) errors[c] += shares[e] * relative[c];
      }
      result.error.push_back(std::move(errors));
    }
    all.push_back(std::move(result));
    control.Report({.stage = "measure",
                    .layer = layer,
                    .num_layers = num_layers,
                    .work_done = layer + 1,
                    .work_total = num_layers});
  }
  return all;
}

QuantizePlan AllocateToSize(const Model& model, const QuantizePlan& plan,
                            const std::vector<PackedFormat>& candidates,
                            const std::vector<LayerErrors>& errors, uint64_t size,
                            Allocation* allocation) {
  // Extents begin at multiples of the alignment; the larger one is an upper bound for all.
  std::vector<AllocationItem> items;
  uint64_t alignment = kPackedAlignment;
  for (const LayerErrors& layer : errors) {
    for (const FeedForwardSlices& expert :
         model.layers()[static_cast<size_t>(layer.layer)].experts) {
      if (PackedExpertBytes(expert, candidates.back()) >= kLargeExtentBytes)
        alignment = kExtentAlignment;
    }
  }
  QuantizePlan smallest = plan;
  uint64_t smallest_bytes = 0, tensors = 0;
  for (const LayerErrors& layer : errors) {
    const LayerSlices& slices = model.layers()[static_cast<size_t>(layer.layer)];
    for (size_t e = 0; e < slices.experts.size(); ++e) {
      AllocationItem item;
      for (const PackedFormat& format : candidates) {
        item.bytes.push_back((PackedExpertBytes(slices.experts[e], format) + alignment - 1) /
                             alignment * alignment);
      }
      item.error = layer.error[e];
      smallest_bytes += item.bytes.front();
      ++tensors;
      items.push_back(std::move(item));
    }
    smallest.layers[static_cast<size_t>(layer.layer)].experts.assign(slices.experts.size(),
                                                                     candidates.front());
  }
  // Offsets in a header may become longer by some digits each.
  const uint64_t base = QuantizedFileBytes(model, smallest) + 16 * tensors + 4096;
  const uint64_t rest = base > smallest_bytes ? base - smallest_bytes : 0;
  if (rest > size) {
    throw UsageError(fmt::format("all but the experts takes {}, more than {}", FormatBytes(rest),
                                 FormatBytes(size)),
                     "give a larger --size, or fewer bits to the rest (--rest)");
  }
  const Allocation found = AllocateBits(items, size - rest);
  QuantizePlan result = smallest;
  size_t at = 0;
  for (const LayerErrors& layer : errors) {
    for (PackedFormat& format : result.layers[static_cast<size_t>(layer.layer)].experts) {
      format = candidates[static_cast<size_t>(found.choice[at++])];
    }
  }
  if (allocation != nullptr) *allocation = found;
  return result;
}

}  // namespace winnow
