// GPTQ in the order of the formats: groups whose inputs are largest come first, and in a group its
// largest columns, so that the scale of a group is chosen when its first column is rounded, on
// weights that already carry the errors of all columns before.
//
// With H = R R^T, R upper triangular in that order, and U = R^-1: H^-1 = U^T U. Rounding column i
// of a row by an error e moves column j > i by - e U_ij / U_ii, and costs e^2 / U_ii^2 of output
// error when the rest makes up for it as well as it can.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/checked_math.h"  // CeilDiv
#include "base/error.h"
#include "kernels/inverse.h"
#include "kernels/matmul.h"
#include "quantize/group_fit.h"
#include "quantize/rounding.h"

namespace winnow {
namespace {

constexpr int64_t kBlockColumns = 128;  // rounded before the columns after them are updated

struct Block {
  int64_t first = 0, count = 0;  // positions in the order
};
struct Blocks {
  std::vector<Block> groups;  // runs of positions
  std::vector<Block> blocks;  // whole groups, kBlockColumns positions at most
};

int64_t GroupSize(const PackedFormat& format, int64_t cols, int64_t group) {
  return std::min(format.group_columns, cols - group * format.group_columns);
}

std::vector<int64_t> OrderColumns(const PackedFormat& format, int64_t cols,
                                  std::span<const double> moments) {
  const auto diagonal = [&](int64_t col) { return moments[static_cast<size_t>(col * cols + col)]; };
  const int64_t num_groups = CeilDiv(cols, format.group_columns);
  std::vector<double> mean(static_cast<size_t>(num_groups), 0.0);
  for (int64_t col = 0; col < cols; ++col) {
    const int64_t group = col / format.group_columns;
    mean[static_cast<size_t>(group)] +=
        diagonal(col) / static_cast<double>(GroupSize(format, cols, group));
  }
  std::vector<int64_t> groups(static_cast<size_t>(num_groups));
  std::iota(groups.begin(), groups.end(), 0);
  std::stable_sort(groups.begin(), groups.end(), [&](int64_t a, int64_t b) {
    return mean[static_cast<size_t>(a)] > mean[static_cast<size_t>(b)];
  });
  std::vector<int64_t> order;
  for (const int64_t group : groups) {
    const int64_t count = GroupSize(format, cols, group);
    for (int64_t i = 0; i < count; ++i) order.push_back(group * format.group_columns + i);
    std::stable_sort(order.end() - count, order.end(),
                     [&](int64_t a, int64_t b) { return diagonal(a) > diagonal(b); });
  }
  return order;
}

Blocks BlocksOf(const PackedFormat& format, const std::vector<int64_t>& order) {
  const auto cols = static_cast<int64_t>(order.size());
  Blocks result;
  for (int64_t first = 0; first < cols;) {
    const int64_t group = order[static_cast<size_t>(first)] / format.group_columns;
    const int64_t count = GroupSize(format, cols, group);
    result.groups.push_back({first, count});
    if (result.blocks.empty() || result.blocks.back().count + count > kBlockColumns) {
      result.blocks.push_back({first, 0});
    }
    result.blocks.back().count += count;
    first += count;
  }
  return result;
}

class CompensatedRounder {
 public:
  CompensatedRounder(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                     const InputFactor& factor)
      : rows_(rows),
        cols_(cols),
        format_(format),
        blocks_(BlocksOf(format, factor.order)),
        factor_(factor),
        w_(static_cast<size_t>(rows * cols)),
        error_(static_cast<size_t>(rows * kBlockColumns)),
        codes_(static_cast<size_t>(rows * cols)),
        scales_(static_cast<size_t>(rows * CeilDiv(cols, format.group_columns))),
        minima_(scales_.size()),
        group_weight_(static_cast<size_t>(cols)) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t at = 0; at < cols; ++at) {
        w_[static_cast<size_t>(row * cols + at)] =
            w[row * cols + factor_.order[static_cast<size_t>(at)]];
      }
    }
    for (int64_t at = 0; at < cols; ++at) {
      const float pivot = Factor(at)[at];
      group_weight_[static_cast<size_t>(at)] = 1 / (pivot * pivot);
    }
  }

  void Run(std::byte* bytes, ThreadPool& pool) {
    size_t group = 0;
    for (const Block& block : blocks_.blocks) {
      const size_t first_group = group;
      while (group < blocks_.groups.size() &&
             blocks_.groups[group].first < block.first + block.count) {
        ++group;
      }
      pool.Run(CeilDiv(rows_, kPackedRows), [&](int64_t task, int) {
        GroupFitter fitter(format_);
        for (int64_t row = task * kPackedRows; row < std::min(rows_, (task + 1) * kPackedRows);
             ++row) {
          for (size_t i = first_group; i < group; ++i)
            RoundGroup(row, blocks_.groups[i], block, fitter);
        }
      });
      UpdateAfter(block, pool);
    }
    Store(bytes, pool);
  }

 private:
  const float* Factor(int64_t at) const { return factor_.inverse.data() + at * cols_; }

  void RoundGroup(int64_t row, const Block& group, const Block& block, GroupFitter& fitter) {
    float* w = w_.data() + row * cols_;
    float* error = error_.data() + row * kBlockColumns;
    const GroupScale scale =
        fitter.Fit(w + group.first, group_weight_.data() + group.first, group.count);
    const int64_t stored = factor_.order[static_cast<size_t>(group.first)] / format_.group_columns;
    const auto at_scale = static_cast<size_t>(row * CeilDiv(cols_, format_.group_columns) + stored);
    scales_[at_scale] = scale.scale_bits;
    minima_[at_scale] = scale.minimum_bits;
    const int64_t end = block.first + block.count;
    for (int64_t at = group.first; at < group.first + group.count; ++at) {
      const float* factor = Factor(at);
      const uint8_t code = fitter.Code(scale, w[at]);
      codes_[static_cast<size_t>(row * cols_ + factor_.order[static_cast<size_t>(at)])] = code;
      const float step = (w[at] - fitter.Value(scale, code)) / factor[at];
      error[at - block.first] = step;
      for (int64_t later = at + 1; later < end; ++later) w[later] -= step * factor[later];
    }
  }

  // The columns after a block take its errors at once: W -= E U.
  void UpdateAfter(const Block& block, ThreadPool& pool) {
    const int64_t first = block.first + block.count, rest = cols_ - first;
    if (rest == 0) return;
    const auto* factor =
        static_cast<const std::byte*>(static_cast<const void*>(Factor(block.first) + first));
    const WeightMatrix matrix{factor, block.count, rest, Dtype::kF32, cols_};
    PackedRows errors;
    errors.Pack(error_.data(), rows_, block.count, kBlockColumns, pool);
    change_.resize(static_cast<size_t>(rows_ * rest));
    MatMulTransposed(errors, matrix, change_.data(), rest, pool);
    pool.Run(CeilDiv(rows_, kPackedRows), [&](int64_t task, int) {
      for (int64_t row = task * kPackedRows; row < std::min(rows_, (task + 1) * kPackedRows);
           ++row) {
        float* w = w_.data() + row * cols_ + first;
        const float* change = change_.data() + row * rest;
        for (int64_t i = 0; i < rest; ++i) w[i] -= change[i];
      }
    });
  }

  void Store(std::byte* bytes, ThreadPool& pool) const {
    std::memset(bytes, 0, PackedBytes(format_, rows_, cols_));
    const int64_t groups = CeilDiv(cols_, format_.group_columns);
    pool.Run(CeilDiv(rows_, kPackedRows), [&](int64_t task, int) {
      for (int64_t row = task * kPackedRows; row < std::min(rows_, (task + 1) * kPackedRows);
           ++row) {
        StorePackedRow(format_, cols_, row,
                       {codes_.data() + row * cols_, scales_.data() + row * groups,
                        minima_.data() + row * groups},
                       bytes);
      }
    });
  }

  int64_t rows_, cols_;
  PackedFormat format_;
  Blocks blocks_;
  const InputFactor& factor_;
  std::vector<float> w_;      // [rows, cols] in the order, with the errors taken so far
  std::vector<float> error_;  // [rows, kBlockColumns] over U_ii
  std::vector<float> change_;
  std::vector<uint8_t> codes_;             // [rows, cols] in the matrix's order
  std::vector<uint16_t> scales_, minima_;  // [rows, groups]
  std::vector<float> group_weight_;        // [cols] in the order: 1 / U_ii^2
};

}  // namespace

InputFactor FactorInputs(std::span<const double> moments, int64_t cols, const PackedFormat& format,
                         double damping, ThreadPool& pool) {
  double mean = 0;
  for (int64_t col = 0; col < cols; ++col) mean += moments[static_cast<size_t>(col * cols + col)];
  mean /= static_cast<double>(cols);
  if (!std::isfinite(mean)) {
    throw RuntimeError("the inputs of a matrix are not all finite numbers",
                       "winnow doctor checks the model's weights");
  }
  if (mean == 0) return {};
  InputFactor factor;
  factor.order = OrderColumns(format, cols, moments);
  std::vector<double> reversed(static_cast<size_t>(cols * cols));
  // More damping is taken where rounding in the moments has left them indefinite.
  for (;; damping = std::max(damping * 10, 1e-6)) {
    pool.Run(cols, [&](int64_t i, int) {
      const int64_t row = factor.order[static_cast<size_t>(cols - 1 - i)];
      double* to = reversed.data() + i * cols;
      for (int64_t j = 0; j <= i; ++j) {
        const int64_t col = factor.order[static_cast<size_t>(cols - 1 - j)];
        to[j] = moments[static_cast<size_t>(row * cols + col)];
      }
      // A column without input has no correlations either: it is rounded by itself.
      to[i] = to[i] > 0 ? to[i] + damping * mean : mean;
    });
    if (InverseCholeskyFactor(reversed.data(), cols, pool)) break;
    if (!(damping < 10)) {
      throw RuntimeError("the second moments of a matrix's inputs have no inverse",
                         "calibrate with more text");
    }
  }
  factor.inverse.assign(static_cast<size_t>(cols * cols), 0.0f);
  for (int64_t i = 0; i < cols; ++i) {
    for (int64_t j = i; j < cols; ++j) {
      factor.inverse[static_cast<size_t>(i * cols + j)] =
          static_cast<float>(reversed[static_cast<size_t>((cols - 1 - i) * cols + cols - 1 - j)]);
    }
  }
  return factor;
}

void RoundCompensated(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                      const InputFactor& factor, std::byte* bytes, ThreadPool& pool) {
  if (factor.order.empty()) return RoundPlain(w, rows, cols, format, {}, bytes, pool);
  for (int64_t i = 0; i < rows * cols; ++i) {
    if (std::isfinite(w[i])) continue;
    throw ModelError(
        fmt::format("the weight at row {}, column {} is not a finite number", i / cols, i % cols),
        "winnow doctor lists the tensors that have such weights");
  }
  CompensatedRounder(w, rows, cols, format, factor).Run(bytes, pool);
}

void RoundCompensated(const float* w, int64_t rows, int64_t cols, const PackedFormat& format,
                      std::span<const double> moments, double damping, std::byte* bytes,
                      ThreadPool& pool) {
  RoundCompensated(w, rows, cols, format, FactorInputs(moments, cols, format, damping, pool), bytes,
                   pool);
}

}  // namespace winnow
