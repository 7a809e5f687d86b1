#include "quantize/group_fit.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/dtype.h"
#include "base/error.h"

namespace winnow {
namespace {

constexpr int64_t kPadding = 16;       // SumCodes
constexpr size_t kRefined = 4;         // candidates that least squares improves further
constexpr int kRefinements = 6;        // rounds of it at most
constexpr float kLargestHalf = 65504;  // f16

// Where the code of the largest weight may lie, as shares of 2^(bits - 1): below one its end of the
// grid is not used, above one the weight is clipped. The fewer bits, the more clipping pays.
struct SymmetricSearch {
  float from, to;
  int steps;
};
constexpr std::array<SymmetricSearch, 9> kSymmetricSearch = {{{},
                                                              {},
                                                              {0.55f, 2.6f, 32},
                                                              {0.7f, 2.0f, 28},
                                                              {0.8f, 1.6f, 26},
                                                              {0.88f, 1.3f, 22},
                                                              {0.94f, 1.15f, 32},
                                                              {0.97f, 1.08f, 12},
                                                              {0.98f, 1.05f, 12}}};

std::vector<float> SymmetricPositions(int bits) {
  const SymmetricSearch& search = kSymmetricSearch[static_cast<size_t>(bits)];
  const auto half = static_cast<float>(1 << (bits - 1));
  std::vector<float> positions;
  for (int step = 0; step < search.steps; ++step) {
    const float share = static_cast<float>(step) / static_cast<float>(search.steps - 1);
    positions.push_back(half * (search.from + share * (search.to - search.from)));
  }
  // Weights that are on the grid already: their largest has a whole code.
  for (int code = bits <= 4 ? 1 : (1 << (bits - 1)) - 1; code <= 1 << (bits - 1); ++code) {
    positions.push_back(static_cast<float>(code));
  }
  return positions;
}

// Where the largest weight may lie in a shifted grid, as shares of half its range, and what is left
// out between: in steps of a scale's last bit (1/32 to 1/64 of it) and of shifts.
struct ShiftSearch {
  float from, to;
  int scale_step, shift_step;
};
constexpr std::array<ShiftSearch, 9> kShiftSearch = {{{},
                                                      {},
                                                      {0.5f, 2.2f, 4, 2},
                                                      {0.6f, 1.8f, 4, 2},
                                                      {0.66f, 1.4f, 4, 2},
                                                      {0.75f, 1.25f, 2, 2},
                                                      {0.8f, 1.2f, 2, 2},
                                                      {0.8f, 1.15f, 2, 2},
                                                      {0.8f, 1.1f, 3, 2}}};
constexpr int kNegativeScale = 1 << (15 - kShiftBits);         // of an f16 without shift bits
constexpr int kLargestScaleCode = (0x7c00 >> kShiftBits) - 1;  // below infinity

std::vector<float> AsymmetricClips(int bits) {
  if (bits == 2) return {-0.08f, -0.04f, 0, 0.04f, 0.08f, 0.12f, 0.16f, 0.2f, 0.25f};
  if (bits == 3) return {-0.03f, 0, 0.03f, 0.06f, 0.1f, 0.14f, 0.18f};
  if (bits == 4) return {-0.015f, 0, 0.02f, 0.04f, 0.07f, 0.1f};
  return {0, 0.01f, 0.03f};
}

}  // namespace

GroupFitter::GroupFitter(const PackedFormat& format) : format_(format) {
  const auto size = static_cast<size_t>(format.group_columns);
  x_.resize(size);
  weight_.resize(size);
  switch (format.grid) {
    case PackedGrid::kSymmetric:
      positions_ = SymmetricPositions(format.bits);
      [[fallthrough]];
    case PackedGrid::kShifted:
      high_ = static_cast<float>((1 << (format.bits - 1)) - 1);
      low_ = -high_ - 1;
      break;
    case PackedGrid::kAsymmetric:
      high_ = static_cast<float>((1 << format.bits) - 1);
      clips_ = AsymmetricClips(format.bits);
      break;
    case PackedGrid::kLogarithmic:
    case PackedGrid::kCurved: {
      const std::array<int8_t, 16> levels = GridLevels(format);
      levels_.assign(levels.begin(), levels.begin() + (1 << format.bits));
      break;
    }
  }
}

GroupScale GroupFitter::Decoded(uint16_t scale_bits, uint16_t minimum_bits) const {
  const GroupValues values = DecodeGroup(format_, scale_bits, minimum_bits);
  return {scale_bits, minimum_bits, values.scale, values.minimum};
}

// Without shift; with kAsymmetric the minimum beside the scale.
GroupScale GroupFitter::Stored(float scale, float minimum) const {
  const float half = scale / ScaleFactor(format_);
  if (!(std::fabs(half) <= kLargestHalf) || !(std::fabs(minimum) <= kLargestHalf)) {
    throw ModelError(fmt::format("a weight of magnitude {:g} is too large for a scale in f16",
                                 static_cast<double>(std::max(largest_, -smallest_))));
  }
  const bool with_minimum = format_.grid == PackedGrid::kAsymmetric;
  return Decoded(F16FromFloat(half), with_minimum ? F16FromFloat(minimum) : uint16_t{0});
}

GroupScale GroupFitter::Fit(const float* x, const float* weight, int64_t count) {
  count_ = count;
  padded_ = (count + kPadding - 1) / kPadding * kPadding;
  const float heaviest = *std::max_element(weight, weight + count);
  weight_sum_ = square_sum_ = 0;
  largest_ = -std::numeric_limits<float>::infinity();
  smallest_ = -largest_;
  for (int64_t i = 0; i < padded_; ++i) {
    const auto at = static_cast<size_t>(i);
    x_[at] = i < count ? x[i] : 0;
    weight_[at] = i >= count ? 0 : heaviest > 0 ? weight[i] / heaviest : 1;
    if (weight_[at] == 0) continue;
    largest_ = std::max(largest_, x_[at]);
    smallest_ = std::min(smallest_, x_[at]);
    const auto w = static_cast<double>(weight_[at]), value = static_cast<double>(x_[at]);
    weight_sum_ += w;
    square_sum_ += w * value * value;
  }
  if (largest_ == 0 && smallest_ == 0) return {};
  candidates_.clear();
  switch (format_.grid) {
    case PackedGrid::kAsymmetric:
      return FitAsymmetric();
    case PackedGrid::kLogarithmic:
      return FitLogarithmic();
    case PackedGrid::kShifted:
    case PackedGrid::kCurved:
      return FitShifted();
    case PackedGrid::kSymmetric:
      break;
  }
  return FitSymmetric();
}

void GroupFitter::AddCandidate(float scale, float minimum) {
  const float inverse = 1 / scale;
  if (std::isfinite(inverse) && inverse != 0) candidates_.push_back({inverse, -minimum * inverse});
}

GroupScale GroupFitter::FitSymmetric() {
  const float magnitude = std::max(largest_, -smallest_);
  for (const float position : positions_) {
    AddCandidate(magnitude / position, 0);
    AddCandidate(-magnitude / position, 0);
  }
  return SearchCandidates();
}

GroupScale GroupFitter::FitAsymmetric() {
  const float range = largest_ - smallest_;
  if (range == 0) return Stored(0, smallest_);
  for (const float below : clips_) {
    for (const float above : clips_) {
      AddCandidate(range * (1 - below - above) / high_, smallest_ + below * range);
    }
  }
  return SearchCandidates();
}

// Takes codes in turn with the scale (and minimum) least squares gives for them, as stored, while
// the error falls. The least error so far.
double GroupFitter::Refine(float scale, float minimum, GroupScale* best, double best_error) {
  double previous = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRefinements; ++round) {
    const GroupScale stored = Stored(scale, minimum);
    const float inverse = 1 / stored.scale;
    if (!std::isfinite(inverse)) return best_error;
    const CodeCandidate candidate = {inverse, -stored.minimum * inverse};
    CodeSums sums;
    SumCodes(x_.data(), weight_.data(), padded_, low_, high_, {&candidate, 1}, &sums);
    const auto step = static_cast<double>(stored.scale);
    const double error = static_cast<double>(sums.rr) * step * step;
    if (!(error < previous)) return best_error;
    previous = error;
    if (error < best_error) {
      best_error = error;
      *best = stored;
    }
    const auto r = static_cast<double>(sums.r), q = static_cast<double>(sums.q);
    const auto rq = static_cast<double>(sums.rq), qq = static_cast<double>(sums.qq);
    if (format_.grid == PackedGrid::kSymmetric) {
      if (qq == 0) return best_error;
      scale = static_cast<float>(step * (1 + rq / qq));
      continue;
    }
    const double determinant = weight_sum_ * qq - q * q;
    if (!(determinant > 0)) return best_error;
    scale = static_cast<float>(step * (1 + (weight_sum_ * rq - r * q) / determinant));
    // The minimum that fits the scale as it will be stored.
    const double change = static_cast<double>(Stored(scale, 0).scale) / step - 1;
    minimum = static_cast<float>(static_cast<double>(stored.minimum) +
                                 step * (r - change * q) / weight_sum_);
  }
  return best_error;
}

GroupScale GroupFitter::SearchCandidates() {
  sums_.resize(candidates_.size());
  SumCodes(x_.data(), weight_.data(), padded_, low_, high_, candidates_, sums_.data());
  // The errors with the best scale for a candidate's codes; the few best are refined.
  std::array<std::pair<double, size_t>, kRefined> first;
  first.fill({std::numeric_limits<double>::infinity(), 0});
  for (size_t i = 0; i < candidates_.size(); ++i) {
    const auto rr = static_cast<double>(sums_[i].rr), r = static_cast<double>(sums_[i].r);
    const auto q = static_cast<double>(sums_[i].q), qq = static_cast<double>(sums_[i].qq);
    const auto rq = static_cast<double>(sums_[i].rq);
    double gain = 0;
    if (format_.grid == PackedGrid::kSymmetric) {
      gain = qq > 0 ? rq * rq / qq : 0;
    } else {
      const double determinant = weight_sum_ * qq - q * q;
      const double change = determinant > 0 ? (weight_sum_ * rq - r * q) / determinant : 0;
      const double shift = (r - change * q) / weight_sum_;
      gain = change * rq + shift * r;
    }
    const auto inverse = static_cast<double>(candidates_[i].inverse_scale);
    const std::pair<double, size_t> found = {(rr - gain) / (inverse * inverse), i};
    if (!(found < first.back())) continue;
    first.back() = found;
    for (size_t at = kRefined - 1; at > 0 && first[at] < first[at - 1]; --at) {
      std::swap(first[at], first[at - 1]);
    }
  }
  GroupScale best;  // zeros: weights below the smallest f16 may have no better
  double best_error = square_sum_;
  for (const auto& [error, i] : first) {
    if (!std::isfinite(error)) break;
    const float scale = 1 / candidates_[i].inverse_scale;
    best_error = Refine(scale, -candidates_[i].offset * scale, &best, best_error);
  }
  return best;
}

GroupScale GroupFitter::FitLogarithmic() {
  constexpr int kSteps = 48;  // of the scale over the largest weight, from 0.4 to 1.4
  const float magnitude = std::max(largest_, -smallest_);
  GroupScale best;
  double best_error = square_sum_;
  for (int step = 0; step < kSteps; ++step) {
    float scale = magnitude / 64 * (0.4f + static_cast<float>(step) / (kSteps - 1));
    for (int round = 0; round < 2; ++round) {
      const GroupScale stored = Stored(scale, 0);
      double error = 0, product = 0, square = 0;
      for (int64_t i = 0; i < count_; ++i) {
        const auto at = static_cast<size_t>(i);
        const uint8_t code = Code(stored, x_[at]);
        const auto level = static_cast<double>(levels_[code]);
        const auto w = static_cast<double>(weight_[at]), value = static_cast<double>(x_[at]);
        const double rest = value - static_cast<double>(Value(stored, code));
        error += w * rest * rest;
        product += w * value * level;
        square += w * level * level;
      }
      if (error < best_error) {
        best_error = error;
        best = stored;
      }
      if (square == 0) break;
      scale = static_cast<float>(product / square);
    }
  }
  return best;
}

// Scales of 11 bits, sign included, and shifts are searched as they are stored: first over the
// range where the largest weight falls near an end of the grid, then around the best found.
GroupScale GroupFitter::FitShifted() {
  const ShiftSearch& search = kShiftSearch[static_cast<size_t>(format_.bits)];
  const float magnitude = std::max(largest_, -smallest_);
  const float end = levels_.empty() ? -low_ : 128;
  GroupScale best;
  double best_error = square_sum_;
  const auto code_of = [&](float position) {
    return Stored(magnitude / (end * position), 0).scale_bits >> kShiftBits;
  };
  const int smallest = code_of(search.to), largest = code_of(search.from);
  for (int code = smallest; code <= largest; code += search.scale_step) {
    AddShifts(code, 0, kShiftMask, search.shift_step);
    // A curved grid is not its own mirror image.
    if (!levels_.empty()) AddShifts(code | kNegativeScale, 0, kShiftMask, search.shift_step);
  }
  TryShifted(&best, &best_error);
  constexpr int kRounds = 4, kReach = 2;
  for (int round = 0; round < kRounds; ++round) {
    const uint16_t bits = best.scale_bits;
    const int shift = bits & kShiftMask;
    for (int code = -kReach; code <= kReach; ++code) {
      AddShifts((bits >> kShiftBits) + code, shift - kReach, shift + kReach, 1);
    }
    TryShifted(&best, &best_error);
    if (best.scale_bits == bits) break;
  }
  return best;
}

// Candidates of one scale, as far as there are such a scale and shifts.
void GroupFitter::AddShifts(int scale_code, int first, int last, int step) {
  const int magnitude = scale_code & (kNegativeScale - 1);
  if (scale_code < 0 || magnitude == 0 || magnitude > kLargestScaleCode) return;
  const auto scale_bits = static_cast<uint16_t>(scale_code << kShiftBits);
  const float inverse = 1 / Decoded(scale_bits, 0).scale;
  if (!std::isfinite(inverse)) return;
  const float unit = ShiftStep(format_);
  for (int shift = std::max(first, 0); shift <= std::min<int>(last, kShiftMask); shift += step) {
    candidates_.push_back({inverse, -static_cast<float>(shift - kShiftZero) * unit});
    candidate_bits_.push_back(static_cast<uint16_t>(scale_bits | shift));
  }
}

// Takes the best of the candidates if it is better, and forgets them all.
void GroupFitter::TryShifted(GroupScale* best, double* best_error) {
  errors_.resize(candidates_.size());
  SumErrors(x_.data(), weight_.data(), padded_, {.low = low_, .high = high_, .levels = levels_},
            candidates_, errors_.data());
  size_t found = candidates_.size();
  for (size_t i = 0; i < candidates_.size(); ++i) {
    const auto inverse = static_cast<double>(candidates_[i].inverse_scale);
    const double error = static_cast<double>(errors_[i]) / (inverse * inverse);
    if (!(error < *best_error)) continue;
    *best_error = error;
    found = i;
  }
  if (found < candidates_.size()) *best = Decoded(candidate_bits_[found], 0);
  candidates_.clear();
  candidate_bits_.clear();
}

uint8_t GroupFitter::Code(const GroupScale& group, float x) const {
  if (group.scale == 0) return 0;
  if (format_.grid == PackedGrid::kCurved) {
    const float exact = (x - group.minimum) / group.scale;
    size_t code = 0;
    while (code + 1 < levels_.size() && exact > (levels_[code] + levels_[code + 1]) / 2) ++code;
    return static_cast<uint8_t>(code);
  }
  if (format_.grid == PackedGrid::kLogarithmic) {
    const float unit = 1 / group.scale;
    const float magnitude = std::fabs(x * unit);
    const auto half = static_cast<size_t>(1) << (format_.bits - 1);
    size_t code = 0;
    while (code + 1 < half && magnitude < (levels_[code] + levels_[code + 1]) / 2) ++code;
    return static_cast<uint8_t>(x * unit < 0 ? half + code : code);
  }
  const float inverse = 1 / group.scale;
  const float exact = std::fma(x, inverse, -group.minimum * inverse);
  const float code = std::clamp(std::nearbyint(exact), low_, high_);
  return static_cast<uint8_t>(code - low_);
}

float GroupFitter::Value(const GroupScale& group, uint8_t code) const {
  const float level = levels_.empty() ? static_cast<float>(code) + low_ : levels_[code];
  return std::fma(level, group.scale, group.minimum);
}

}  // namespace winnow
