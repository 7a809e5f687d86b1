#include "kernels/attend.h"

#include <algorithm>

#include "kernels/elementwise.h"  // Softmax

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attend.cc"
#include "hwy/foreach_target.h"  // before highway.h
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace winnow {
namespace HWY_NAMESPACE {

// scores[s] = q . keys[s], four keys at a time; lane sums as SumLanesOfFour orders them.
void ScoreKeys(const float* q, const float* keys, int64_t num_keys, int64_t head_dim,
               float* scores) {
  const DF d;
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  for (int64_t s = 0; s < num_keys; s += 4) {
    const float* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = keys + std::min(s + i, num_keys - 1) * head_dim;
    VF sums[4];
    HWY_UNROLL(4)
    for (VF& sum : sums) sum = hn::Zero(d);
    int64_t c = 0;
    for (; c + kStep <= head_dim; c += kStep) {
      const VF x = hn::LoadU(d, q + c);
      HWY_UNROLL(4)
      for (size_t i = 0; i < 4; ++i) sums[i] = hn::MulAdd(x, hn::LoadU(d, rows[i] + c), sums[i]);
    }
    if (c < head_dim) {
      const auto left = static_cast<size_t>(head_dim - c);
      const VF x = LoadPartial(q + c, left);
      HWY_UNROLL(4)
      for (size_t i = 0; i < 4; ++i) {
        sums[i] = hn::MulAdd(x, LoadPartial(rows[i] + c, left), sums[i]);
      }
    }
    float four[4];
    SumLanesOfFour(sums, four);
    std::copy_n(four, std::min<int64_t>(4, num_keys - s), scores + s);
  }
}

// out = sum over keys in order of weight * value, kVectors vectors of channels from `c` at a time.
template <size_t kVectors>
HWY_INLINE void SumValues(const float* weights, const float* values, int64_t num_keys,
                          int64_t head_dim, float* out) {
  const DF d;
  VF sums[kVectors];
  HWY_UNROLL(4)
  for (VF& sum : sums) sum = hn::Zero(d);
  for (int64_t s = 0; s < num_keys; ++s, values += head_dim) {
    const VF weight = hn::Set(d, weights[s]);
    HWY_UNROLL(4)
    for (size_t i = 0; i < kVectors; ++i) {
      sums[i] = hn::MulAdd(weight, hn::LoadU(d, values + i * kLanes), sums[i]);
    }
  }
  for (size_t i = 0; i < kVectors; ++i) hn::StoreU(sums[i], d, out + i * kLanes);
}

void MixValues(const float* weights, const float* values, int64_t num_keys, int64_t head_dim,
               float* out) {
  constexpr auto kStep = static_cast<int64_t>(kLanes);
  int64_t c = 0;
  for (; c + 4 * kStep <= head_dim; c += 4 * kStep) {
    SumValues<4>(weights, values + c, num_keys, head_dim, out + c);
  }
  for (; c + kStep <= head_dim; c += kStep) {
    SumValues<1>(weights, values + c, num_keys, head_dim, out + c);
  }
  for (; c < head_dim; ++c) {
    float sum = 0;
    for (int64_t s = 0; s < num_keys; ++s) sum += weights[s] * values[s * head_dim + c];
    out[c] = sum;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace winnow
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace winnow {

HWY_EXPORT(ScoreKeys);
HWY_EXPORT(MixValues);

void AttendOne(const float* q, int64_t queries, const float* keys, const float* values,
               int64_t num_keys, int64_t head_dim, float scale, float* scores, float* out) {
  for (int64_t i = 0; i < queries; ++i) {
    HWY_DYNAMIC_DISPATCH(ScoreKeys)(q + i * head_dim, keys, num_keys, head_dim, scores);
    for (int64_t s = 0; s < num_keys; ++s) scores[s] *= scale;
    Softmax(scores, 1, num_keys, num_keys);
    HWY_DYNAMIC_DISPATCH(MixValues)(scores, values, num_keys, head_dim, out + i * head_dim);
  }
}

}  // namespace winnow
#endif  // HWY_ONCE
