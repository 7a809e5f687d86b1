#include "forward/logits.h"

#include <algorithm>

#include "base/aligned_buffer.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "weights/layer_reader.h"

namespace winnow {

void ComputeLogits(const Model& model, ThreadPool& pool, const float* hidden, int64_t n,
                   float* logits) {
  const int64_t h = model.config().hidden_size, vocabulary = model.config().vocab_size;
  const std::vector<float> norm = LoadVector(model, model.final_norm());
  AlignedBuffer<float> normed(static_cast<size_t>(n * h));
  RmsNorm(hidden, n, h, h, norm.data(), model.config().rms_norm_eps, normed.data(), h);
  PackedRows packed;
  packed.Pack(normed.data(), n, h, h, pool);
  for (int64_t first = 0; first < vocabulary; first += kVocabularyChunk) {
    const LoadedMatrix head =
        LoadRows(model, model.lm_head(), first, std::min(kVocabularyChunk, vocabulary - first));
    MatMul(packed, head.matrix, logits + first, vocabulary, pool);
  }
}

}  // namespace winnow
