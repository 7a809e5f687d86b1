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
constexpr std::array kLambdas = {100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4};
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
  int64_t num_rows = 0;  // tokens that use it
  // With no more rows than columns the same minimum is found in the rows' space: dW = Y S P, S =
  // sqrt(c), and (A + r I)^-1 of columns becomes (S P P^T S + r I)^-1 of rows.
  bool in_rows() const { return num_rows <= columns; }
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
      result_.steps.push_back({blocks[b].expert, AlignedBuffer<float>()});
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = width * p / parts, end = width * (p + 1) / parts;
        parts_.push_back(
            {b, result_.steps.size() - 1, first, end - first, std::ssize(blocks[b].tokens)});
        cache_bytes += static_cast<uint64_t>((end - first) * (end - first)) * sizeof(double);
        most_columns_ = std::max(most_columns_, end - first);
      }
    }
    if (cache_bytes <= options.cache_bytes) {
      cache_.resize(parts_.size());
      kernels_.resize(parts_.size());
    }
    multipliers_.resize(parts_.size());
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
    int rises = 0;  // stop when less and less damping has brought nothing twice
    for (const double lambda : kLambdas) {
      Sweep(lambda, Tokens::kTrain);
      const double error = HeldOutError();
      if (error < result_.held_out_after) {
        result_.held_out_after = error;
        result_.lambda = lambda;
        rises = 0;
      } else if (++rises == 2) {
        break;
      }
    }
    if (result_.lambda == 0) {
      result_.steps.clear();
      return std::move(result_);
    }
    // From what the training tokens gave, which is near.
    for (std::vector<double>& gram : cache_) gram = std::vector<double>();
    keep_inverses_ = !cache_.empty();
    inverses_.resize(parts_.size());
    for (int i = 0; i < sweeps_; ++i) Sweep(result_.lambda, Tokens::kAll);
    for (size_t p = 0; p < parts_.size(); ++p) {
      if (parts_[p].in_rows()) {
        FinishInRows(p);
      } else {
        ChangeOf(parts_[p]);  // zeros, if there was nothing to fit
      }
    }
    return std::move(result_);
  }

 private:
  void Reset() {
    std::memcpy(residual_.data(), in_.residual.data(), in_.residual.size_bytes());
    for (size_t p = 0; p < parts_.size(); ++p) {
      const Part& part = parts_[p];
      if (part.in_rows()) {
        multipliers_[p].assign(static_cast<size_t>(in_.hidden * part.num_rows), 0.0f);
      } else {
        std::memset(ChangeOf(part).data(), 0, ChangeOf(part).size_bytes());
      }
    }
  }

  int64_t WidthOf(const Part& part) const { return in_.activations.blocks()[part.block].width; }
  // The change of the part's expert, made when it is first needed.
  AlignedBuffer<float>& ChangeOf(const Part& part) {
    AlignedBuffer<float>& change = result_.steps[part.step].change;
    if (change.size() == 0) {
      change = AlignedBuffer<float>(static_cast<size_t>(in_.hidden * WidthOf(part)));
      std::memset(change.data(), 0, change.size_bytes());
    }
    return change;
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
      if (parts_[p].in_rows()) {
        SolveInRows(p, lambda, tokens);
      } else {
        SolveInColumns(p, lambda, tokens);
      }
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

  // A damped Gram matrix's inverse, and the damping on its diagonal. Empty: nothing to fit.
  struct Damped {
    std::vector<float> inverse;
    double ridge = 0;
  };
  // The inverse of the symmetric matrix in damped_ plus lambda trace / m on its diagonal. Kept
  // while sweep after sweep has the same lambda.
  void Invert(size_t size, double lambda, double trace, size_t m, Damped& damped) {
    damped.inverse.clear();
    damped.ridge = lambda * trace / static_cast<double>(m);
    if (!(damped.ridge > 0) || !std::isfinite(damped.ridge)) return;
    for (size_t i = 0; i < size; ++i) damped_[i * (size + 1)] += damped.ridge;
    // Rounding of the f32 products can leave a Gram matrix of few tokens a little indefinite: more
    // damping than that is wanted anyway.
    if (!InvertPositiveDefinite(damped_.data(), static_cast<int64_t>(size), pool_)) return;
    damped.inverse.assign(damped_.begin(),
                          damped_.begin() + static_cast<std::ptrdiff_t>(size * size));
  }

  // (A + lambda d I)^-1 of a part's columns.
  void InvertColumns(size_t p, double lambda, Tokens tokens, Damped& damped) {
    const Part& part = parts_[p];
    const auto m = static_cast<size_t>(part.columns);
    if (cache_.empty()) {
      damped_ = Gram(part, tokens);
    } else {
      if (cache_[p].empty()) cache_[p] = Gram(part, tokens);
      damped_.assign(cache_[p].begin(), cache_[p].end());
      if (keep_inverses_) cache_[p] = std::vector<double>();  // the inverse takes its place
    }
    double trace = 0;
    for (size_t i = 0; i < m; ++i) trace += damped_[i * (m + 1)];
    Invert(m, lambda, trace, m, damped);
  }

  // (S P P^T S + lambda d I)^-1 of a part's rows.
  void InvertRows(size_t p, double lambda, std::span<const float> kernel,
                  std::span<const float> root, Damped& damped) {
    const auto n = static_cast<size_t>(parts_[p].num_rows);
    damped_.resize(n * n);
    double trace = 0;
    for (size_t i = 0; i < n; ++i) {
      const auto scale = static_cast<double>(root[i]);
      // From one side of the diagonal: rounding may differ on the other.
      for (size_t j = 0; j <= i; ++j) {
        const double value =
            scale * static_cast<double>(kernel[i * n + j]) * static_cast<double>(root[j]);
        damped_[i * n + j] = value;
        damped_[j * n + i] = value;
      }
      trace += damped_[i * (n + 1)];
    }
    Invert(n, lambda, trace, static_cast<size_t>(parts_[p].columns), damped);
  }

  // All rows P [n, columns] of a part that is solved in rows.
  void ReadRows(const Part& part) {
    Grow(rows_, std::max(kChunkRows * most_columns_, part.num_rows * part.columns));
    in_.activations.Read(part.block, 0, part.num_rows, part.first_column, part.columns,
                         rows_.data());
  }

  // P P^T [n, n], no token weighted.
  std::vector<float> Kernel(const Part& part) {
    const int64_t n = part.num_rows, m = part.columns;
    ReadRows(part);
    packed_.Pack(rows_.data(), n, m, m, pool_);
    const WeightMatrix matrix{std::as_bytes(rows_.span()).data(), n, m, Dtype::kF32};
    std::vector<float> kernel(static_cast<size_t>(n * n));
    MatMul(packed_, matrix, kernel.data(), n, pool_);
    return kernel;
  }

  // sqrt(c) of the part's rows, 0 for held-out tokens while training.
  std::vector<float> RootWeights(const Part& part, Tokens tokens) const {
    std::vector<float> roots;
    for (const int32_t token : in_.activations.blocks()[part.block].tokens) {
      roots.push_back(std::sqrt(WeightOf(token, tokens)));
    }
    return roots;
  }

  // SolveInColumns for fewer rows than columns.
  void SolveInRows(size_t p, double lambda, Tokens tokens) {
    const Part& part = parts_[p];
    const int64_t h = in_.hidden, n = part.num_rows;
    std::vector<float> computed;
    if (kernels_.empty()) {
      computed = Kernel(part);
    } else if (kernels_[p].empty()) {
      kernels_[p] = Kernel(part);
    }
    const std::vector<float>& kernel = kernels_.empty() ? computed : kernels_[p];
    const std::vector<float> root = RootWeights(part, tokens);
    Damped& damped = keep_inverses_ ? inverses_[p] : inverse_;
    if (!keep_inverses_ || damped.inverse.empty()) InvertRows(p, lambda, kernel, root, damped);
    if (damped.inverse.empty()) return;
    // Z^T = R^T S - r Y [hidden, n]; the change of Y is Z^T times the inverse.
    const std::vector<int32_t>& ids = in_.activations.blocks()[part.block].tokens;
    Grow(gathered_, n * h);
    Grow(scaled_, std::max(kChunkRows * std::max(most_columns_, h), n * h));
    for (size_t i = 0; i < ids.size(); ++i) {
      std::memcpy(gathered_.data() + static_cast<int64_t>(i) * h,
                  residual_.data() + int64_t{ids[i]} * h, static_cast<size_t>(h) * sizeof(float));
    }
    TransposeScaled(gathered_.data(), root.data(), n, h, scaled_.data(), n, pool_);
    std::vector<float>& multipliers = multipliers_[p];
    const auto r = static_cast<float>(damped.ridge);
    pool_.Run(h, [&](int64_t row, int) {
      for (int64_t i = row * n; i < (row + 1) * n; ++i) {
        scaled_.data()[i] -= r * multipliers[static_cast<size_t>(i)];
      }
    });
    Grow(change_, h * n);
    packed_.Pack(scaled_.data(), h, n, n, pool_);
    MatMul(packed_, {std::as_bytes(std::span(damped.inverse)).data(), n, n, Dtype::kF32},
           change_.data(), n, pool_);
    Grow(weighted_, h * n);  // Y S
    pool_.Run(h, [&](int64_t row, int) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = row * n + i;
        multipliers[static_cast<size_t>(at)] += change_.data()[at];
        weighted_.data()[at] = change_.data()[at] * root[static_cast<size_t>(i)];
      }
    });
    // R -= P P^T S Y^T
    Grow(product_, std::max(kChunkRows * h, n * h));
    packed_.Pack(kernel.data(), n, n, n, pool_);
    MatMul(packed_, {std::as_bytes(weighted_.span()).data(), h, n, Dtype::kF32}, product_.data(), h,
           pool_);
    SubtractRows(ids, product_.data());
  }

  // The change of the down projection from the multipliers of all tokens: Y S P.
  void FinishInRows(size_t p) {
    const Part& part = parts_[p];
    const int64_t h = in_.hidden, n = part.num_rows, m = part.columns, width = WidthOf(part);
    const std::vector<float> root = RootWeights(part, Tokens::kAll);
    ReadRows(part);
    Grow(transposed_, std::max(kChunkRows * most_columns_, n * m));
    TransposeScaled(rows_.data(), root.data(), n, m, transposed_.data(), n, pool_);
    packed_.Pack(multipliers_[p].data(), h, n, n, pool_);
    MatMul(packed_, {std::as_bytes(transposed_.span()).data(), m, n, Dtype::kF32},
           ChangeOf(part).data() + part.first_column, width, pool_);
    multipliers_[p] = std::vector<float>();
  }

  // residual[ids[i]] -= rows[i]
  void SubtractRows(std::span<const int32_t> ids, const float* rows) {
    const int64_t h = in_.hidden, count = std::ssize(ids);
    constexpr int64_t kRows = 64;
    pool_.Run((count + kRows - 1) / kRows, [&](int64_t task, int) {
      for (int64_t i = task * kRows; i < std::min(count, (task + 1) * kRows); ++i) {
        float* to = residual_.data() + int64_t{ids[static_cast<size_t>(i)]} * h;
        const float* from = rows + i * h;
        for (int64_t j = 0; j < h; ++j) to[j] -= from[j];
      }
    });
  }

  void SolveInColumns(size_t p, double lambda, Tokens tokens) {
    const Part& part = parts_[p];
    const int64_t h = in_.hidden, m = part.columns;
    Damped& damped = keep_inverses_ ? inverses_[p] : inverse_;
    if (!keep_inverses_ || damped.inverse.empty()) InvertColumns(p, lambda, tokens, damped);
    if (damped.inverse.empty()) return;
    const double ridge = damped.ridge;
    const std::vector<float>& inverse = damped.inverse;
    const std::vector<double> correlation = Correlation(part, tokens);
    AlignedBuffer<float>& total = ChangeOf(part);
    const int64_t width = WidthOf(part);
    // The change of this block's change: (sum c R p^T - lambda d dW) (A + lambda d I)^-1.
    std::vector<float> gradient(correlation.size());
    pool_.Run(h, [&](int64_t r, int) {
      for (int64_t c = 0; c < m; ++c) {
        const auto at = static_cast<size_t>(r * m + c);
        const float change = total[static_cast<size_t>(r * width + part.first_column + c)];
        gradient[at] = static_cast<float>(correlation[at] - ridge * static_cast<double>(change));
      }
    });
    packed_.Pack(gradient.data(), h, m, m, pool_);
    const WeightMatrix inverse_matrix{std::as_bytes(std::span(inverse)).data(), m, m, Dtype::kF32};
    std::vector<float> change(gradient.size());
    MatMul(packed_, inverse_matrix, change.data(), m, pool_);
    pool_.Run(h, [&](int64_t r, int) {
      for (int64_t c = 0; c < m; ++c) {
        total[static_cast<size_t>(r * width + part.first_column + c)] +=
            change[static_cast<size_t>(r * m + c)];
      }
    });
    // R -= dW p
    const WeightMatrix change_matrix{std::as_bytes(std::span(change)).data(), h, m, Dtype::kF32};
    Grow(product_, kChunkRows * h);
    ForChunks(part, [&](int64_t count, std::span<const int32_t> ids, const float* rows) {
      packed_.Pack(rows, count, m, m, pool_);
      MatMul(packed_, change_matrix, product_.data(), h, pool_);
      SubtractRows(ids, product_.data());
    });
  }

  const RefitInput& in_;
  ThreadPool& pool_;
  const JobControl& control_;
  int sweeps_ = 0;
  int64_t most_columns_ = 0;
  std::vector<Part> parts_;
  // Kept between sweeps if they fit: Gram matrices of columns, kernels of rows.
  std::vector<std::vector<double>> cache_;
  std::vector<std::vector<float>> kernels_;
  std::vector<std::vector<float>> multipliers_;  // Y [hidden, n] of parts solved in rows
  AlignedBuffer<float> residual_;                // [T, hidden] what the steps so far leave
  LayerRefit result_;
  bool keep_inverses_ = false;
  std::vector<Damped> inverses_;  // of every part, while keep_inverses_
  Damped inverse_;
  std::vector<double> damped_;
  PackedRows packed_;
  AlignedBuffer<float> rows_, transposed_, scaled_, gathered_, product_, change_, weighted_;
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
  uint64_t most_columns = 1, steps = 0, widest = 0;
  for (const int64_t width : widths) {
    steps += h * static_cast<uint64_t>(width) * sizeof(float);
    widest = std::max(widest, static_cast<uint64_t>(width));
    most_columns = std::max(most_columns,
                            static_cast<uint64_t>((width + NumParts(width) - 1) / NumParts(width)));
  }
  const uint64_t square = most_columns * most_columns;
  const uint64_t panel = h * most_columns;
  // One expert's change beside its multipliers; residual and its copy; Gram matrix (or kernel), its
  // inverse's work and f32 form; correlation, gradient, change; products and chunks with their
  // transposes and packs.
  return steps + widest * h * sizeof(float) + 2 * n * h * sizeof(float) +
         square * (3 * sizeof(double) + 4 * sizeof(float)) +
         panel * (sizeof(double) + 6 * sizeof(float)) +
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
