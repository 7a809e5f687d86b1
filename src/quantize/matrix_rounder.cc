#include "quantize/matrix_rounder.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

constexpr int64_t kPieceWeights = int64_t{4} << 20;

// Rows of a piece: whole blocks, at least one.
int64_t PieceRows(int64_t cols) {
  return std::max<int64_t>(kPieceWeights / cols / kPackedRows, 1) * kPackedRows;
}

}  // namespace

AlignedBuffer<std::byte> MatrixRounder::Round(const WeightMatrix& w, const PackedFormat& format,
                                              const RoundingInputs& inputs,
                                              const std::string& name) {
  AlignedBuffer<std::byte> bytes(PackedBytes(format, w.rows, w.cols));
  std::byte* to = bytes.data();
  const int64_t step = PieceRows(w.cols);
  for (int64_t first = 0; first < w.rows; first += step) {
    const int64_t rows = std::min(step, w.rows - first);
    RoundRows(w, first, rows, first, format, inputs, name, to);
    to += PackedBytes(format, rows, w.cols);
  }
  return bytes;
}

void MatrixRounder::RoundRows(const WeightMatrix& w, int64_t first, int64_t rows, int64_t named_row,
                              const PackedFormat& format, const RoundingInputs& inputs,
                              const std::string& name, std::byte* to) {
  const int64_t cols = w.cols;
  values_.resize(static_cast<size_t>(rows * cols));
  pool_.Run(rows, [&](int64_t row, int) { WidenRow(w, first + row, values_.data() + row * cols); });
  try {
    if (inputs.factor) {
      RoundCompensated(values_.data(), rows, cols, format, *inputs.factor, to, pool_);
    } else {
      RoundPlain(values_.data(), rows, cols, format, inputs.column_weight, to, pool_);
    }
  } catch (const ModelError& problem) {  // it knows rows and columns, not the tensor
    throw ModelError(fmt::format("{}, from row {}: {}", name, named_row, problem.what()),
                     problem.hint());
  }
}

uint64_t MatrixRounder::Bytes(int64_t cols) {
  // The piece in f32; in RoundCompensated again, with its change and its codes.
  return static_cast<uint64_t>(PieceRows(cols)) * static_cast<uint64_t>(cols) * 13;
}

}  // namespace winnow
