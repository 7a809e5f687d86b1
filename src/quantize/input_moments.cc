#include "quantize/input_moments.h"

#include <cmath>

namespace winnow {

InputMoments::InputMoments(int64_t cols)
    : cols_(cols), sum_(static_cast<size_t>(cols * cols), 0.0) {}

void InputMoments::Add(const float* x, const float* weight, int64_t rows, ThreadPool& pool) {
  if (rows == 0) return;
  scaled_.resize(static_cast<size_t>(kMomentRows * cols_));
  product_.resize(static_cast<size_t>(cols_ * cols_));
  for (int64_t row = 0; row < rows; ++row) {
    const float root = std::sqrt(weight[row]);
    for (int64_t i = 0; i < cols_; ++i) {
      scaled_[static_cast<size_t>(row * cols_ + i)] = root * x[row * cols_ + i];
    }
    const auto a = static_cast<double>(weight[row]);
    weight_ += a;
    weight_squared_ += a * a;
  }
  packed_.PackTransposed(scaled_.data(), cols_, rows, cols_, pool);
  const WeightMatrix matrix{std::as_bytes(std::span(scaled_)).data(), rows, cols_, Dtype::kF32};
  MatMulTransposed(packed_, matrix, product_.data(), cols_, pool);
  pool.Run(cols_, [&](int64_t row, int) {
    double* to = sum_.data() + row * cols_;
    const float* from = product_.data() + row * cols_;
    for (int64_t i = 0; i < cols_; ++i) to[i] += static_cast<double>(from[i]);
  });
}

double InputMoments::EffectiveRows() const {
  return weight_squared_ > 0 ? weight_ * weight_ / weight_squared_ : 0;
}

std::vector<double> InputMoments::TakeBlended(const InputMoments* prior, double prior_rows) {
  const double own = weight_ > 0 ? EffectiveRows() / weight_ : 0;
  std::vector<double> blended = std::move(sum_);
  for (double& value : blended) value *= own;
  if (prior == nullptr || !(prior->weight_ > 0)) return blended;
  const double other = prior_rows / prior->weight_;
  for (size_t i = 0; i < blended.size(); ++i) blended[i] += other * prior->sum_[i];
  return blended;
}

uint64_t InputMoments::Bytes(int64_t cols) {
  const auto n = static_cast<uint64_t>(cols);
  return n * n * (sizeof(double) + sizeof(float)) +
         static_cast<uint64_t>(kMomentRows) * n * sizeof(float) +
         PackedRows::Bytes(cols, kMomentRows);
}

}  // namespace winnow
