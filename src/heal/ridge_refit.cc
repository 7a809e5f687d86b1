#include "heal/ridge_refit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernels/accumulate.h"
#include "kernels/inverse.h"
#include "kernels/matmul.h"

namespace winnow {
namespace {

// Rows that go through a product at once. Fixed: it is the order of the sums over tokens.
constexpr int64_t kChunkRows = 1024;
// Most columns of one block; wider experts are cut into equal parts.
constexpr int64_t kMaxColumns = 2048;
constexpr std::array kLambdas = {100.0, 30.0, 10.0, 3.0,  1.0,  0.3,
                                 0.1,   0.03, 0.01, 3e-3, 1e-3, 1e-4};
// Below this mean of c |R|^2 a layer's error is rounding and there is nothing to repair.
constexpr double kNoError = 1e-11;

int64_t NumParts(int64_t width) {
  return (width + kMaxColumns - 1) / kMaxColumns;
}

// out [columns, rows] (stride ld_out) = the transpose of in [rows, columns], rows scaled.
void TransposeScaled(const float* in, const float* scale, int64_t rows, int64_t columns, float* out,
                     int64_t ld_out, ThreadPool& pool) {
  constexpr int64_t kTile = 32;
  pool.Run((columns + kTile - 1) / kTile, [&](int64_t task, int) {
    const int64_t first = task * kTile, end = std::min(columns, first + kTile);
    for (int64_t row = 0; row < rows; row += kTile) {
      const int64_t last = std::min(rows, row + kTile);
      for (int64_t c = first; c < end; ++c) {
        for (int64_t r = row; r < last; ++r) {
          const float s = scale == nullptr ? 1.0f : scale[r];
          out[c * ld_out + r] = s * in[r * columns + c];
        }
      }
    }
  });
}

// A block of columns that is solved at once.
struct Part {
  size_t block = 0;  // in the store
  size_t step = 0;   // its place in the steps
  int64_t first_column = 0, columns = 0;
};

enum class Tokens { kTrain, kAll };

class Refitter {
 public:
  Refitter(const RefitInput& input, const RefitOptions& options, ThreadPool& pool,
           const JobControl& control)
      : in_(input), pool_(pool), control_(control), residual_(input.residual.size()) {
    const std::vector<ActivationStore::Block>& blocks = in_.activations.blocks();
    uint64_t cache_bytes = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      if (static_cast<int64_t>(blocks[b].tokens.size()) < kLeastRefitRows) {
        ++result_.skipped_experts;
        continue;
      }
      const int64_t width = blocks[b].width, parts = NumParts(width);
      result_.steps.push_back(
          {blocks[b].expert, AlignedBuffer<float>(static_cast<size_t>(in_.hidden * width))});
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = width * p / parts, end = width * (p + 1) / parts;
        parts_.push_back({b, result_.steps.size() - 1, first, end - first});
        cache_bytes += static_cast<uint64_t>((end - first) * (end - first)) * sizeof(double);
        most_columns_ = std::max(most_columns_, end - first);
      }
    }
    if (cache_bytes <= options.cache_bytes) cache_.resize(parts_.size());
    sweeps_ = options.sweeps;
  }

  LayerRefit Run() {
    Reset();
    result_.held_out_before = HeldOutError();
    result_.held_out_after = result_.held_out_before;
    if (parts_.empty() || TotalError() < kNoError * static_cast<double>(in_.weight.size())) {
      result_.steps.clear();
      return std::move(result_);
    }
    int rises = 0;  // stop when less and less damping has made it worse twice
    for (const double lambda : kLambdas) {
      Sweep(lambda, Tokens::kTrain);
      const double error = HeldOutError();
      if (error < result_.held_out_after) {
        result_.held_out_after = error;
        result_.lambda = lambda;
        rises = 0;
      } else if (result_.lambda > 0 && ++rises == 2) {
        break;
      }
    }
    if (result_.lambda == 0) {
      result_.steps.clear();
      return std::move(result_);
    }
    Reset();
    for (std::vector<double>& gram : cache_) gram.clear();
    for (int i = 0; i < sweeps_; ++i) Sweep(result_.lambda, Tokens::kAll);
    return std::move(result_);
  }

 private:
  void Reset() {
    std::memcpy(residual_.data(), in_.residual.data(), in_.residual.size_bytes());
    for (RefitStep& step : result_.steps) {
      std::memset(step.change.data(), 0, step.change.size_bytes());
    }
  }

  // sum c |R|^2 over the tokens `chosen` picks.
  template <class Chosen>
  double WeightedError(const Chosen& chosen) const {
    const auto n = static_cast<int64_t>(in_.weight.size());
    std::vector<double> error(static_cast<size_t>(n));
    constexpr int64_t kTokens = 256;
    pool_.Run((n + kTokens - 1) / kTokens, [&](int64_t task, int) {
      for (int64_t t = task * kTokens; t < std::min(n, (task + 1) * kTokens); ++t) {
        const auto at = static_cast<size_t>(t);
        if (!chosen(at)) continue;
        const float* row = residual_.data() + t * in_.hidden;
        double sum = 0;
        for (int64_t i = 0; i < in_.hidden; ++i) {
          sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
        }
        error[at] = sum * static_cast<double>(in_.weight[at]);
      }
    });
    double total = 0;
    for (const double e : error) total += e;
    return total;
  }
  double HeldOutError() const {
    return WeightedError([&](size_t t) { return in_.held_out[t] != 0; });
  }
  double TotalError() const {
    return WeightedError([](size_t) { return true; });
  }

  // One exact minimisation over each block in turn.
  void Sweep(double lambda, Tokens tokens) {
    for (size_t p = 0; p < parts_.size(); ++p) {
      control_.Poll();
      Solve(p, lambda, tokens);
    }
  }

  // body(first row, rows, their tokens, P [rows, columns]) for each chunk of the part's rows.
  template <class Body>
  void ForChunks(const Part& part, const Body& body) {
    const std::vector<int32_t>& tokens = in_.activations.blocks()[part.block].tokens;
    const auto n = static_cast<int64_t>(tokens.size());
    Grow(rows_, kChunkRows * most_columns_);
    for (int64_t first = 0; first < n; first += kChunkRows) {
      const int64_t count = std::min(kChunkRows, n - first);
      in_.activations.Read(part.block, first, count, part.first_column, part.columns, rows_.data());
      body(count, std::span(tokens).subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
           rows_.data());
    }
  }

  // The weight of a token in the sums, 0 for held-out ones while training.
  float WeightOf(int32_t token, Tokens tokens) const {
    const auto t = static_cast<size_t>(token);
    return tokens == Tokens::kTrain && in_.held_out[t] != 0 ? 0.0f : in_.weight[t];
  }

  // sums [x rows, w rows] += X W^T, both given as [.., count].
  void AddProduct(const float* x, int64_t x_rows, const float* w, int64_t w_rows, int64_t count,
                  double* sums) {
    packed_.Pack(x, x_rows, count, kChunkRows, pool_);
    const WeightMatrix matrix{std::as_bytes(std::span(w, static_cast<size_t>(1))).data(), w_rows,
                              count, Dtype::kF32, kChunkRows};
    Grow(product_, x_rows * w_rows);
    MatMul(packed_, matrix, product_.data(), w_rows, pool_);
    constexpr int64_t kRows = 16;
    pool_.Run((x_rows + kRows - 1) / kRows, [&](int64_t task, int) {
      const int64_t first = task * kRows, end = std::min(x_rows, first + kRows);
      AccumulateRows(sums + first * w_rows, product_.data() + first * w_rows, 1, w_rows,
                     (end - first) * w_rows);
    });
  }

  // sum c p p^T [columns, columns].
  std::vector<double> Gram(const Part& part, Tokens tokens) {
    std::vector<double> gram(static_cast<size_t>(part.columns * part.columns), 0.0);
    Grow(transposed_, kChunkRows * most_columns_);
    Grow(scaled_, kChunkRows * std::max(most_columns_, in_.hidden));
    ForChunks(part, [&](int64_t count, std::span<const int32_t> ids, const float* rows) {
      weights_.resize(ids.size());
      for (size_t i = 0; i < ids.size(); ++i) weights_[i] = WeightOf(ids[i], tokens);
      TransposeScaled(rows, nullptr, count, part.columns, transposed_.data(), kChunkRows, pool_);
      TransposeScaled(rows, weights_.data(), count, part.columns, scaled_.data(), kChunkRows,
                      pool_);
      AddProduct(scaled_.data(), part.columns, transposed_.data(), part.columns, count,
                 gram.data());
    });
    return gram;
  }

  // sum c R p^T [hidden, columns].
  std::vector<double> Correlation(const Part& part, Tokens tokens) {
    std::vector<double> sums(static_cast<size_t>(in_.hidden * part.columns), 0.0);
    const int64_t h = in_.hidden;
    Grow(transposed_, kChunkRows * most_columns_);
    Grow(scaled_, kChunkRows * std::max(most_columns_, h));
    Grow(gathered_, kChunkRows * h);
    ForChunks(part, [&](int64_t count, std::span<const int32_t> ids, const float* rows) {
      weights_.resize(ids.size());
      for (size_t i = 0; i < ids.size(); ++i) {
        weights_[i] = WeightOf(ids[i], tokens);
        std::memcpy(gathered_.data() + static_cast<int64_t>(i) * h,
                    residual_.data() + int64_t{ids[i]} * h, static_cast<size_t>(h) * sizeof(float));
      }
      TransposeScaled(rows, nullptr, count, part.columns, transposed_.data(), kChunkRows, pool_);
      TransposeScaled(gathered_.data(), weights_.data(), count, h, scaled_.data(), kChunkRows,
                      pool_);
      AddProduct(scaled_.data(), h, transposed_.data(), part.columns, count, sums.data());
    });
    return sums;
  }

  // (A + lambda d I)^-1 in f32; empty if the part has nothing to fit. `ridge` becomes lambda d.
  std::vector<float> DampedInverse(size_t p, double lambda, Tokens tokens, double& ridge) {
    const Part& part = parts_[p];
    const auto m = static_cast<size_t>(part.columns);
    std::vector<double> gram;
    if (!cache_.empty()) {
      if (cache_[p].empty()) cache_[p] = Gram(part, tokens);
      gram = cache_[p];
    } else {
      gram = Gram(part, tokens);
    }
    double trace = 0;
    for (size_t i = 0; i < m; ++i) trace += gram[i * (m + 1)];
    ridge = lambda * trace / static_cast<double>(m);
    if (!(ridge > 0) || !std::isfinite(ridge)) return {};
    for (size_t i = 0; i < m; ++i) gram[i * (m + 1)] += ridge;
    // Rounding of the f32 products can leave a Gram matrix of few tokens a little indefinite: more
    // damping than that is wanted anyway.
    if (!InvertPositiveDefinite(gram.data(), part.columns, pool_)) return {};
    return {gram.begin(), gram.end()};
  }

  void Solve(size_t p, double lambda, Tokens tokens) {
    const Part& part = parts_[p];
    const int64_t h = in_.hidden, m = part.columns;
    double ridge = 0;
    const std::vector<float> inverse = DampedInverse(p, lambda, tokens, ridge);
    if (inverse.empty()) return;
    const std::vector<double> correlation = Correlation(part, tokens);
    RefitStep& step = result_.steps[part.step];
    const int64_t width = in_.activations.blocks()[part.block].width;
    // The change of this block's change: (sum c R p^T - lambda d dW) (A + lambda d I)^-1.
    std::vector<float> gradient(correlation.size());
    pool_.Run(h, [&](int64_t r, int) {
      for (int64_t c = 0; c < m; ++c) {
        const auto at = static_cast<size_t>(r * m + c);
        const float change = step.change[static_cast<size_t>(r * width + part.first_column + c)];
        gradient[at] = static_cast<float>(correlation[at] - ridge * static_cast<double>(change));
      }
    });
    packed_.Pack(gradient.data(), h, m, m, pool_);
    const WeightMatrix inverse_matrix{std::as_bytes(std::span(inverse)).data(), m, m, Dtype::kF32};
    std::vector<float> change(gradient.size());
    MatMul(packed_, inverse_matrix, change.data(), m, pool_);
    pool_.Run(h, [&](int64_t r, int) {
      for (int64_t c = 0; c < m; ++c) {
        step.change[static_cast<size_t>(r * width + part.first_column + c)] +=
            change[static_cast<size_t>(r * m + c)];
      }
    });
    // R -= dW p
    const WeightMatrix change_matrix{std::as_bytes(std::span(change)).data(), h, m, Dtype::kF32};
    Grow(product_, kChunkRows * h);
    ForChunks(part, [&](int64_t count, std::span<const int32_t> ids, const float* rows) {
      packed_.Pack(rows, count, m, m, pool_);
      MatMul(packed_, change_matrix, product_.data(), h, pool_);
      constexpr int64_t kRows = 64;
      pool_.Run((count + kRows - 1) / kRows, [&](int64_t task, int) {
        for (int64_t i = task * kRows; i < std::min(count, (task + 1) * kRows); ++i) {
          float* to = residual_.data() + int64_t{ids[static_cast<size_t>(i)]} * h;
          const float* from = product_.data() + i * h;
          for (int64_t j = 0; j < h; ++j) to[j] -= from[j];
        }
      });
    });
  }

  static void Grow(AlignedBuffer<float>& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.size()) < count) {
      buffer = AlignedBuffer<float>(static_cast<size_t>(count));
    }
  }

  const RefitInput& in_;
  ThreadPool& pool_;
  const JobControl& control_;
  int sweeps_ = 0;
  int64_t most_columns_ = 0;
  std::vector<Part> parts_;
  std::vector<std::vector<double>> cache_;  // Gram matrices; empty if they are not kept
  AlignedBuffer<float> residual_;           // [T, hidden] what the steps so far leave
  LayerRefit result_;
  PackedRows packed_;
  AlignedBuffer<float> rows_, transposed_, scaled_, gathered_, product_;
  std::vector<float> weights_;
};

}  // namespace

LayerRefit RefitDownProjections(const RefitInput& input, const RefitOptions& options,
                                ThreadPool& pool, const JobControl& control) {
  return Refitter(input, options, pool, control).Run();
}

uint64_t RefitBytes(int64_t num_tokens, int64_t hidden, std::span<const int64_t> widths) {
  const auto h = static_cast<uint64_t>(hidden), n = static_cast<uint64_t>(num_tokens);
  const auto chunk = static_cast<uint64_t>(kChunkRows);
  uint64_t most_columns = 1, steps = 0;
  for (const int64_t width : widths) {
    steps += h * static_cast<uint64_t>(width) * sizeof(float);
    most_columns = std::max(most_columns,
                            static_cast<uint64_t>((width + NumParts(width) - 1) / NumParts(width)));
  }
  const uint64_t square = most_columns * most_columns;
  const uint64_t panel = h * most_columns;
  // Residual and its copy; Gram matrix, its inverse's work and f32 form; correlation, gradient,
  // change; products and chunks with their transposes and packs.
  return steps + 2 * n * h * sizeof(float) + square * (3 * sizeof(double) + sizeof(float)) +
         panel * (sizeof(double) + 4 * sizeof(float)) +
         (std::max(square, std::max(panel, chunk * h)) + chunk * (4 * most_columns + 3 * h)) *
             sizeof(float);
}

uint64_t RefitCacheBytes(std::span<const int64_t> widths) {
  uint64_t bytes = 0;
  for (const int64_t width : widths) {
    const auto parts = static_cast<uint64_t>(NumParts(width)), w = static_cast<uint64_t>(width);
    const uint64_t columns = (w + parts - 1) / parts;
    bytes += parts * columns * columns * sizeof(double);
  }
  return bytes;
}

}  // namespace winnow
