#include "train/output_loss.h"

#include <algorithm>
#include <cmath>

#include "kernels/elementwise.h"

namespace winnow {

OutputLoss::OutputLoss(int64_t hidden, int64_t vocab_size, ThreadPool& pool)
    : hidden_(hidden), vocab_size_(vocab_size), pool_(pool), products_(pool) {}

// 64 MiB of logits, but enough rows for a product.
int64_t OutputLoss::BlockTokens(int64_t vocab_size) {
  return std::clamp<int64_t>((int64_t{16} << 20) / vocab_size, 64, 1024);
}

void OutputLoss::Logits(const OutputHead& head, const float* stream, int64_t hidden, int64_t rows,
                        AlignedBuffer<float>& logits) {
  GrowBuffer(normed_, rows * hidden);
  GrowBuffer(logits, rows * vocab_size_);
  ForRowRanges(pool_, rows, [&](int64_t first, int64_t end) {
    RmsNorm(stream + first * hidden, end - first, hidden, hidden, head.norm.data(), head.eps,
            normed_.data() + first * hidden, hidden);
  });
  packed_.Pack(normed_.data(), rows, hidden, hidden, pool_);
  MatMul(packed_, head.lm_head, logits.data(), vocab_size_, pool_);
}

LossSums OutputLoss::Run(const OutputHead& head, const OutputLossCall& call) {
  const TrainBatch& batch = *call.batch;
  const int64_t n = batch.num_tokens(), h = hidden_, vocabulary = vocab_size_;
  std::vector<double> entropy(static_cast<size_t>(n)), divergence(static_cast<size_t>(n));
  for (int64_t first = 0; first < n; first += BlockTokens(vocabulary)) {
    const int64_t rows = std::min(BlockTokens(vocabulary), n - first);
    if (call.teacher != nullptr) {
      const int64_t width = call.teacher->lm_head.cols;
      Logits(*call.teacher, call.teacher_stream + first * width, width, rows, teacher_logits_);
    }
    Logits(head, call.stream + first * h, h, rows, logits_);
    pool_.Run(rows, [&](int64_t i, int) {
      const auto at = static_cast<size_t>(first + i);
      float* row = logits_.data() + i * vocabulary;
      const int32_t target = batch.targets[at];
      if (target < 0) {
        std::fill_n(row, vocabulary, 0.0f);  // becomes the gradient
        return;
      }
      const double log_sum = LogSumExp(row, vocabulary);
      entropy[at] = log_sum - static_cast<double>(row[target]);
      float* other = nullptr;
      if (call.teacher != nullptr) {
        other = teacher_logits_.data() + i * vocabulary;
        const double other_sum = LogSumExp(other, vocabulary);
        double sum = 0;
        for (int64_t v = 0; v < vocabulary; ++v) {
          const double log_p = static_cast<double>(other[v]) - other_sum;
          const double p = std::exp(log_p);
          sum += p * (log_p - (static_cast<double>(row[v]) - log_sum));
          other[v] = static_cast<float>(p);
        }
        divergence[at] = sum;
      }
      if (call.d_stream == nullptr) return;
      // Cross entropy: p - [v = target]; KL: p - p*.
      const double factor = call.scale * static_cast<double>(batch.weights[at]);
      const auto scale = static_cast<float>(factor);
      Softmax(row, 1, vocabulary, vocabulary);
      if (other != nullptr) {
        const auto share = static_cast<float>(call.divergence_share);
        for (int64_t v = 0; v < vocabulary; ++v) row[v] -= share * other[v];
        row[target] -= 1.0f - share;
      } else {
        row[target] -= 1.0f;
      }
      for (int64_t v = 0; v < vocabulary; ++v) row[v] *= scale;
    });
    if (call.d_stream == nullptr) continue;
    GrowBuffer(d_normed_, rows * h);
    products_.Input(logits_.data(), rows, head.lm_head, d_normed_.data());
    float* d_stream = call.d_stream + first * h;
    std::fill_n(d_stream, rows * h, 0.0f);
    products_.Norm(call.stream + first * h, rows, 1, h, head.norm, head.eps, d_normed_.data(),
                   d_stream, call.d_norm);
  }
  LossSums sums;
  for (size_t t = 0; t < entropy.size(); ++t) {
    if (batch.targets[t] < 0) continue;
    const auto weight = static_cast<double>(batch.weights[t]);
    sums.cross_entropy += weight * entropy[t];
    sums.divergence += weight * divergence[t];
    sums.weight += weight;
  }
  return sums;
}

uint64_t OutputLoss::ScratchBytes(int64_t hidden, int64_t vocab_size, bool teacher) {
  const int64_t rows = BlockTokens(vocab_size);
  return static_cast<uint64_t>(rows * (2 * hidden + (teacher ? 2 : 1) * vocab_size)) *
             sizeof(float) +
         PackedRows::Bytes(rows, hidden) + PackedRows::Bytes(rows, vocab_size);
}

}  // namespace winnow
