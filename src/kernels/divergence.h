// Jensen-Shannon divergence of residual streams seen as distributions over channels, the objective
// of CD-MoE's searches (arXiv 2412.00069; docs/METHODS.md).
#pragma once

#include <cstdint>

namespace winnow {

// Added to both probabilities and to their mean, as published.
inline constexpr float kDivergenceEpsilon = 1e-10f;

// What a candidate stream is: base + scale * addition (no addition: base alone), through RMSNorm if
// `norm_weight` is set.
struct CandidateStream {
  const float* base = nullptr;      // [rows, n]
  const float* addition = nullptr;  // [rows, n]
  float scale = 0;
  const float* norm_weight = nullptr;  // [n]
  float norm_eps = 0;
};

// out[t * stride] = JS(p_t, q_t) = sum over channels of ((p+e) ln((p+e)/(m+e)) + (q+e)
// ln((q+e)/(m+e))) / 2, with p `probabilities` [rows, n] (softmax of the intact stream), q the
// softmax of the candidate, m = (p + q) / 2, natural logarithm. Computed as m' g(r) with r = (q -
// p) / 2m', m' = m + e and g(r) = (1-r) ln(1-r) + (1+r) ln(1+r), which does not cancel where p and
// q are close; f32 within a row. `scratch` holds n floats.
void JensenShannon(const float* probabilities, const CandidateStream& candidate, int64_t rows,
                   int64_t n, float* scratch, double* out, int64_t stride);
void JensenShannonReference(const float* probabilities, const CandidateStream& candidate,
                            int64_t rows, int64_t n, double* out, int64_t stride);

}  // namespace winnow
