#include "quantize/quantize_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/units.h"
#include "model/weight_parts.h"
#include "quantize/matrix_rounder.h"
#include "quantize/packed_layout.h"
#include "weights/layer_reader.h"

namespace winnow {
namespace {

constexpr int64_t kPieceWeights = int64_t{16} << 20;  // read, widened and rounded at a time

// Rows of a piece: whole blocks, at least one.
int64_t PieceRows(int64_t cols) {
  return std::max<int64_t>(kPieceWeights / cols / kPackedRows, 1) * kPackedRows;
}

uint64_t Weights(const TensorSlice& slice) {
  return static_cast<uint64_t>(slice.rows) * static_cast<uint64_t>(slice.cols);
}

// Calls visit(slice, format) for every matrix the plan packs.
template <class Visit>
void ForEachRounded(const Model& model, const QuantizePlan& plan, const Visit& visit) {
  for (int64_t l = 0; l < std::ssize(plan.layers); ++l) {
    const LayerFormats& formats = plan.layers[static_cast<size_t>(l)];
    const LayerSlices& slices = model.layers()[static_cast<size_t>(l)];
    for (size_t e = 0; e < slices.experts.size(); ++e) {
      const PackedFormat format = formats.Expert(e);
      if (format.empty()) continue;
      const FeedForwardSlices& expert = slices.experts[e];
      for (const TensorSlice* slice : {&expert.gate, &expert.up, &expert.down}) {
        visit(*slice, format);
      }
    }
    for (const PackedMatrix matrix : PackedMatricesOf(plan, l)) {
      visit(SliceOf(model, l, matrix), FormatOf(plan, l, matrix));
    }
  }
  if (!plan.lm_head.empty()) visit(model.lm_head(), plan.lm_head);
}

class PlainQuantizer {
 public:
  PlainQuantizer(const Model& model, const QuantizePlan& plan, PackedCheckpointWriter& writer,
                 ThreadPool& pool, const JobControl& control)
      : model_(model), plan_(plan), writer_(writer), control_(control), rounder_(pool) {
    ForEachRounded(model, plan, [&](const TensorSlice& slice, const PackedFormat&) {
      total_ += static_cast<int64_t>(slice.bytes());
    });
  }

  void Run() {
    for (layer_ = 0; layer_ < std::ssize(plan_.layers); ++layer_) {
      QuantizeExperts();
      for (const PackedMatrix matrix : PackedMatricesOf(plan_, layer_)) QuantizeMatrix(matrix);
    }
    layer_ = std::ssize(plan_.layers) - 1;
    if (!plan_.lm_head.empty()) QuantizeMatrix(PackedMatrix::kLmHead);
  }

 private:
  void QuantizeExperts() {
    const auto l = static_cast<size_t>(layer_);
    for (size_t e = 0; e < model_.layers()[l].experts.size(); ++e) {
      const PackedFormat format = plan_.layers[l].Expert(e);
      if (format.empty()) continue;
      const FeedForwardSlices& expert = model_.layers()[l].experts[e];
      std::vector<std::byte> gate = Whole(expert.gate, format), up = Whole(expert.up, format),
                             down = Whole(expert.down, format);
      writer_.WriteExpert(layer_, static_cast<int64_t>(e), gate, up, down);
    }
  }

  std::vector<std::byte> Whole(const TensorSlice& slice, const PackedFormat& format) {
    std::vector<std::byte> bytes;
    bytes.reserve(PackedBytes(format, slice.rows, slice.cols));
    ForPieces(slice, format, [&](int64_t, std::span<const std::byte> piece) {
      bytes.insert(bytes.end(), piece.begin(), piece.end());
    });
    return bytes;
  }

  void QuantizeMatrix(PackedMatrix matrix) {
    ForPieces(SliceOf(model_, layer_, matrix), FormatOf(plan_, layer_, matrix),
              [&](int64_t first_row, std::span<const std::byte> piece) {
                writer_.WriteRows(layer_, matrix, first_row, piece);
              });
  }

  template <class Visit>
  void ForPieces(const TensorSlice& slice, const PackedFormat& format, const Visit& visit) {
    const int64_t step = PieceRows(slice.cols);
    for (int64_t first = 0; first < slice.rows; first += step) {
      control_.Poll();
      const int64_t rows = std::min(step, slice.rows - first);
      const LoadedMatrix loaded = LoadRows(model_, slice, first, rows);
      // Bytes between a block's scales and codes stay zeros.
      piece_.assign(PackedBytes(format, rows, slice.cols), std::byte{0});
      rounder_.RoundRows(loaded.matrix, 0, rows, first, format, {}, slice.tensor->name,
                         piece_.data());
      visit(first, std::span<const std::byte>(piece_));
      done_ += static_cast<int64_t>(loaded.storage.size());
      control_.Report({.stage = "quantize",
                       .layer = layer_,
                       .num_layers = std::ssize(plan_.layers),
                       .work_done = done_,
                       .work_total = total_,
                       .bytes = true});
    }
  }

  const Model& model_;
  const QuantizePlan& plan_;
  PackedCheckpointWriter& writer_;
  const JobControl& control_;
  MatrixRounder rounder_;
  std::vector<std::byte> piece_;
  int64_t layer_ = 0, done_ = 0, total_ = 0;
};

std::vector<WeightPart> PartsAfter(const Model& model, const QuantizePlan& plan) {
  return WeightParts(model, plan.layers, plan.lm_head);
}

}  // namespace

QuantizeEstimate EstimateQuantize(const Model& model, const QuantizePlan& plan) {
  CheckQuantizePlan(model, plan);
  QuantizeEstimate estimate;
  uint64_t piece = 0, packed_piece = 0, stored_piece = 0, expert = 0;
  ForEachRounded(model, plan, [&](const TensorSlice& slice, const PackedFormat& format) {
    const int64_t rows = std::min(PieceRows(slice.cols), slice.rows);
    const uint64_t count = static_cast<uint64_t>(rows) * static_cast<uint64_t>(slice.cols);
    piece = std::max(piece, count * sizeof(float));
    stored_piece = std::max(stored_piece, count * (DtypeBits(slice.tensor->dtype) / 8));
    packed_piece = std::max(packed_piece, PackedBytes(format, rows, slice.cols));
    estimate.weights += Weights(slice);
    estimate.bytes_to_read += slice.bytes();
  });
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const std::vector<FeedForwardSlices>& experts = model.layers()[l].experts;
    for (size_t e = 0; e < experts.size(); ++e) {
      const PackedFormat format = plan.layers[l].Expert(e);
      if (format.empty()) continue;
      expert = std::max(expert, PackedExpertBytes(experts[e], format));
    }
  }
  if (estimate.weights == 0) {
    throw UsageError("there is nothing to quantise: no matrix of the model gets a packed format",
                     "give --experts FORMAT, --rest FORMAT, or both");
  }
  estimate.memory.Add("program", kProgramBytes);
  estimate.memory.Add("names and places of tensors", model.checkpoint().tensors().size() * 2048);
  estimate.memory.Add("rows as stored", stored_piece);
  estimate.memory.Add("rows in f32", piece);
  estimate.memory.Add("rows packed", packed_piece);
  if (expert > 0) estimate.memory.Add("an expert, packed", expert);
  estimate.bytes_before = model.checkpoint().total_bytes();
  estimate.bytes_after = QuantizedBytes(model, plan);
  return estimate;
}

PackedWriteResult RunQuantize(const Model& model, const QuantizePlan& plan, const fs::path& out,
                              ThreadPool& pool, const JobControl& control) {
  PackedCheckpointWriter writer(model, plan, out);
  PlainQuantizer(model, plan, writer, pool, control).Run();
  const std::string method = "each weight to the nearest value of its group's grid, without text";
  return writer.Finish(QuantizeCard(model, plan, method), QuantizeRecord(model, plan, method),
                       control);
}

std::string QuantizeCard(const Model& model, const QuantizePlan& plan, const std::string& method) {
  std::string card = fmt::format(
      "Weights of a `{}` model were rounded with Winnow: {}. Winnow reads this folder; other "
      "programs do not know its `.packed` tensors.\n\n",
      model.config().family->model_type, method);
  card +=
      fmt::format("- tensors: {} before, {} after\n- source fingerprint: `{}`\n\n",
                  FormatBytes(model.checkpoint().total_bytes()),
                  FormatBytes(QuantizedBytes(model, plan)), model.checkpoint().FingerprintHex());
  card += "| part | format | matrices | bits per weight | size |\n|---|---|--:|--:|--:|\n";
  for (const WeightPart& part : PartsAfter(model, plan)) {
    card += fmt::format("| {} | {} | {} | {:.2f} | {} |\n", part.part, part.format, part.matrices,
                        part.bits_per_weight(), FormatBytes(part.bytes));
  }
  return card;
}

OrderedJson QuantizeRecord(const Model& model, const QuantizePlan& plan,
                           const std::string& method) {
  OrderedJson parts = OrderedJson::array();
  for (const WeightPart& part : PartsAfter(model, plan)) {
    parts.push_back({{"part", part.part},
                     {"format", part.format},
                     {"matrices", part.matrices},
                     {"weights", part.weights},
                     {"bytes", part.bytes}});
  }
  return {{"schema", "winnow.quantized/1"},
          {"method", method},
          {"model",
           {{"model_type", model.config().family->model_type},
            {"fingerprint", model.checkpoint().FingerprintHex()}}},
          {"bytes_before", model.checkpoint().total_bytes()},
          {"bytes_after", QuantizedBytes(model, plan)},
          {"parts", parts}};
}

}  // namespace winnow
