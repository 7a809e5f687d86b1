// Derivatives of the row-wise operations of a decoder layer, and the optimiser's step, for train/.
// f32; sums inside a row are in a fixed order.
#pragma once

#include <cstdint>

namespace winnow {

// Backward of scale * down(silu(gate) * up) in a row of n: from d_inner, the gradient of the inner
// activations without `scale`, to d_gate and d_up with it; inner = scale * silu(gate) * up, which
// the gradient of `down` multiplies. Returns d_inner . (silu(gate) * up), the gradient of `scale`.
float SwiGluBackward(const float* gate, const float* up, const float* d_inner, float scale,
                     int64_t n, float* d_gate, float* d_up, float* inner);

// y = w x / sqrt(mean(x^2) + eps) in a row of n: d_x += its gradient. With d_weight, of n sums in
// double, the gradient of w is added there.
void RmsNormBackward(const float* x, const float* weight, float eps, const float* d_y, int64_t n,
                     float* d_x, double* d_weight);

// p = softmax(s) in a row of n: d_p becomes the gradient of s times `scale`.
void SoftmaxBackward(const float* p, float scale, int64_t n, float* d_p);

// A step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) as PyTorch's optimiser takes it;
// factors that depend on the step alone are given.
struct AdamWFactors {
  float gradient_scale = 1;  // of clipping
  float decay = 1;           // 1 - lr * weight_decay
  float beta2 = 0.999f;
  float rest1 = 0.1f, rest2 = 0.001f;  // 1 - beta1, 1 - beta2, which f32 differences would blur
  float step_size = 0;                 // lr / (1 - beta1^t)
  float root_bias2 = 1;                // sqrt(1 - beta2^t)
  float epsilon = 1e-8f;
};
void AdamWStep(const AdamWFactors& f, const float* gradient, int64_t n, float* weight, float* m,
               float* v);

}  // namespace winnow
