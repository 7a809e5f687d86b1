#include "forward/rope_table.h"

#include <cmath>

namespace winnow {

RopeTable::RopeTable(const RopeConfig& rope, int64_t head_dim) : half_(head_dim / 2) {
  for (int64_t j = 0; j < half_; ++j) {
    const double exponent = static_cast<double>(2 * j) / static_cast<double>(head_dim);
    inverse_frequencies_.push_back(
        static_cast<float>(1.0 / std::pow(rope.theta, exponent) / rope.linear_factor));
  }
}

void RopeTable::Extend(int64_t count) {
  const auto have = static_cast<int64_t>(cos_.size()) / half_;
  if (count <= have) return;
  cos_.resize(static_cast<size_t>(count * half_));
  sin_.resize(static_cast<size_t>(count * half_));
  for (int64_t position = have; position < count; ++position) {
    for (int64_t j = 0; j < half_; ++j) {
      const float angle =
          static_cast<float>(position) * inverse_frequencies_[static_cast<size_t>(j)];
      // The library's f32 cosine differs between machines in the last bit; rounding the double does
      // not.
      cos_[static_cast<size_t>(position * half_ + j)] =
          static_cast<float>(std::cos(static_cast<double>(angle)));
      sin_[static_cast<size_t>(position * half_ + j)] =
          static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

}  // namespace winnow
