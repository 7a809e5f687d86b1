#include "condense/neuron_choice.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "kernels/accumulate.h"
#include "kernels/elementwise.h"

namespace winnow {
namespace {

constexpr double kDamping = 1e-3;     // of the mean diagonal, as in the measurements of the docs
constexpr double kAlphaRidge = 1e-6;  // of the mean diagonal
constexpr double kLeastPivot = 1e-9;  // of the largest diagonal

// x -= factor * y over n doubles.
void Subtract(double* x, double factor, const double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] -= factor * y[i];
}

// Partial sums side by side: a fixed order that compilers turn into vectors.
double DotDouble(const double* x, const double* y, int64_t n) {
  constexpr int64_t kParts = 8;
  double part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t p = 0; p < kParts; ++p) part[p] += x[i + p] * y[i + p];
  }
  double sum = 0;
  for (; i < n; ++i) sum += x[i] * y[i];
  for (const double value : part) sum += value;
  return sum;
}

// The Cholesky factor of the moments of what was taken, column by column, and the targets on its
// orthogonal basis. Nothing else is updated in a step but two numbers a feature, so a step reads
// the factor once instead of reading and writing all moments. The row of a taken feature in `gram`
// becomes its column of the factor, its row of `cross` its target on the basis: symmetric as the
// moments are, nobody else needs them.
class Selection {
 public:
  Selection(FeatureMoments& moments, double floor, ThreadPool& pool)
      : gram_(moments.gram()),
        cross_(moments.cross()),
        m_(moments.num_features()),
        h_(moments.hidden()),
        floor_(floor),
        pool_(pool),
        left_(static_cast<size_t>(m_)),
        square_(static_cast<size_t>(m_)),
        is_taken_(static_cast<size_t>(m_)),
        target_(static_cast<size_t>(h_)),
        column_(static_cast<size_t>(m_)),
        explained_(static_cast<size_t>(m_)) {
    ForRows([&](int64_t i) {
      left_[static_cast<size_t>(i)] = gram_[i * m_ + i];
      square_[static_cast<size_t>(i)] = DotDouble(cross_ + i * h_, cross_ + i * h_, h_);
    });
  }

  // The untaken feature that explains most of what is left.
  int64_t Best() const {
    int64_t best = -1;
    double most = -1;
    for (int64_t i = 0; i < m_; ++i) {
      const auto at = static_cast<size_t>(i);
      const double gain = is_taken_[at] != 0 ? -1 : square_[at] / std::max(left_[at], floor_);
      if (gain <= most) continue;
      most = gain;
      best = i;
    }
    return best;
  }

  // Takes a feature out of what is left of all others. Returns the error it explains.
  double Take(int64_t pivot) {
    const double root = std::sqrt(std::max(left_[static_cast<size_t>(pivot)], floor_));
    const size_t before = taken_columns_.size();
    std::vector<double> of_pivot(before), of_target(before);  // factors of the rows taken before
    for (size_t k = 0; k < before; ++k) of_pivot[k] = taken_columns_[k][pivot];
    ForRanges(h_, [&](int64_t first, int64_t count) {
      double* to = target_.data() + first;
      std::copy_n(cross_ + pivot * h_ + first, count, to);
      SubtractScaledRows(taken_targets_, first, of_pivot.data(), nullptr, count, to, nullptr);
      for (int64_t i = 0; i < count; ++i) to[i] /= root;
    });
    const double explained = DotDouble(target_.data(), target_.data(), h_);
    pool_.Run(static_cast<int64_t>(before), [&](int64_t k, int) {
      const auto at = static_cast<size_t>(k);
      of_target[at] = DotDouble(taken_targets_[at], target_.data(), h_);
    });
    ForRows([&](int64_t i) {
      if (is_taken_[static_cast<size_t>(i)] != 0) return;
      explained_[static_cast<size_t>(i)] = DotDouble(cross_ + i * h_, target_.data(), h_);
    });
    // What is left of the moments with the pivot, and of the products with its target.
    ForRanges(m_, [&](int64_t first, int64_t count) {
      double* column = column_.data() + first;
      double* product = explained_.data() + first;
      std::copy_n(gram_ + pivot * m_ + first, count, column);
      SubtractScaledRows(taken_columns_, first, of_pivot.data(), of_target.data(), count, column,
                         product);
      for (int64_t i = 0; i < count; ++i) {
        const auto at = static_cast<size_t>(first + i);
        column[i] /= root;
        left_[at] -= column[i] * column[i];
        square_[at] += column[i] * (column[i] * explained - 2 * product[i]);
        square_[at] = std::max(square_[at], 0.0);
      }
    });
    std::copy_n(column_.data(), m_, gram_ + pivot * m_);
    std::copy_n(target_.data(), h_, cross_ + pivot * h_);
    is_taken_[static_cast<size_t>(pivot)] = 1;
    taken_columns_.push_back(gram_ + pivot * m_);
    taken_targets_.push_back(cross_ + pivot * h_);
    return explained;
  }

 private:
  template <class Body>
  void ForRows(const Body& body) {
    constexpr int64_t kRows = 64;
    pool_.Run((m_ + kRows - 1) / kRows, [&](int64_t task, int) {
      for (int64_t i = task * kRows; i < std::min(m_, (task + 1) * kRows); ++i) body(i);
    });
  }
  template <class Body>
  void ForRanges(int64_t n, const Body& body) {
    constexpr int64_t kColumns = 256;  // so that they stay in the first cache
    pool_.Run((n + kColumns - 1) / kColumns, [&](int64_t task, int) {
      body(task * kColumns, std::min(kColumns, n - task * kColumns));
    });
  }

  double* gram_;
  double* cross_;
  int64_t m_, h_;
  double floor_;
  ThreadPool& pool_;
  std::vector<double> left_;    // [M] the diagonal of the moments
  std::vector<double> square_;  // [M] of the products with the target
  std::vector<uint8_t> is_taken_;
  std::vector<const double*> taken_columns_, taken_targets_;  // in the order taken
  std::vector<double> target_, column_, explained_;
};

}  // namespace

NeuronChoice ChooseNeurons(FeatureMoments& moments, int64_t num_forced, int64_t count,
                           ThreadPool& pool, const JobControl& control) {
  const int64_t m = moments.num_features(), h = moments.hidden();
  double* gram = moments.gram();
  double* cross = moments.cross();
  const std::vector<double>&s = moments.feature_sum(), &u = moments.target_sum();
  const double n = moments.weight_sum();
  double error = moments.target_square();
  for (const double value : u) error -= value * value / n;
  double trace = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double mean = s[static_cast<size_t>(i)] / n;
    Subtract(gram + i * m, mean, s.data(), m);
    Subtract(cross + i * h, mean, u.data(), h);
    trace += gram[i * m + i];
  }
  const double damping = kDamping * trace / static_cast<double>(m);
  double largest = 0;
  for (int64_t i = 0; i < m; ++i) {
    gram[i * m + i] += damping;
    largest = std::max(largest, gram[i * m + i]);
  }
  const double floor = std::max(kLeastPivot * largest, std::numeric_limits<double>::min());
  Selection selection(moments, floor, pool);
  NeuronChoice choice;
  for (int64_t i = 0; i < num_forced; ++i) {
    if (i % 64 == 0) control.Poll();
    error -= selection.Take(i);
  }
  choice.remaining.push_back(std::max(error, 0.0));
  while (std::ssize(choice.order) < std::min(count, m - num_forced)) {
    control.Poll();
    const int64_t best = selection.Best();
    error -= selection.Take(best);
    choice.order.push_back(best);
    choice.remaining.push_back(std::max(error, 0.0));
  }
  return choice;
}

std::vector<double> SolveAlphas(std::span<const double> gram, std::span<const double> cross) {
  const size_t n = cross.size();
  std::vector<size_t> used;
  double trace = 0;
  for (size_t i = 0; i < n; ++i) {
    if (gram[i * n + i] > 0) used.push_back(i);
    trace += gram[i * n + i];
  }
  std::vector<double> alphas(n);
  const size_t k = used.size();
  if (k == 0) return alphas;
  const double ridge = kAlphaRidge * trace / static_cast<double>(k);
  std::vector<double> a(k * k), b(k);
  for (size_t i = 0; i < k; ++i) {
    for (size_t j = 0; j < k; ++j) a[i * k + j] = gram[used[i] * n + used[j]];
    a[i * k + i] += ridge;
    b[i] = cross[used[i]];
  }
  // Cholesky, forward and back.
  for (size_t j = 0; j < k; ++j) {
    for (size_t p = 0; p < j; ++p) a[j * k + j] -= a[j * k + p] * a[j * k + p];
    if (!(a[j * k + j] > 0)) return alphas;  // nothing usable: weights of 0
    a[j * k + j] = std::sqrt(a[j * k + j]);
    for (size_t i = j + 1; i < k; ++i) {
      for (size_t p = 0; p < j; ++p) a[i * k + j] -= a[i * k + p] * a[j * k + p];
      a[i * k + j] /= a[j * k + j];
    }
  }
  for (size_t i = 0; i < k; ++i) {
    for (size_t p = 0; p < i; ++p) b[i] -= a[i * k + p] * b[p];
    b[i] /= a[i * k + i];
  }
  for (size_t i = k; i-- > 0;) {
    for (size_t p = i + 1; p < k; ++p) b[i] -= a[p * k + i] * b[p];
    b[i] /= a[i * k + i];
  }
  for (size_t i = 0; i < k; ++i) alphas[used[i]] = b[i];
  return alphas;
}

double ErrorOfAlphas(std::span<const double> gram, std::span<const double> cross,
                     double target_square, std::span<const double> alphas) {
  const size_t n = cross.size();
  double error = target_square;
  for (size_t i = 0; i < n; ++i) {
    error -= 2 * alphas[i] * cross[i];
    for (size_t j = 0; j < n; ++j) error += alphas[i] * gram[i * n + j] * alphas[j];
  }
  return std::max(error, 0.0);
}

ExpertChoice ChooseExperts(std::span<const double> gram, std::span<const double> cross,
                           double target_square, int64_t count) {
  const size_t n = cross.size();
  ExpertChoice choice;
  choice.remaining.push_back(target_square);
  choice.alphas.emplace_back(n);
  std::vector<uint8_t> taken(n);
  while (std::ssize(choice.order) < std::min<int64_t>(count, static_cast<int64_t>(n))) {
    double least = std::numeric_limits<double>::infinity();
    size_t best = n;
    std::vector<double> best_alphas;
    for (size_t e = 0; e < n; ++e) {
      if (taken[e] != 0) continue;
      taken[e] = 1;
      std::vector<double> sub(n * n), sub_cross(n);
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) {
          if (taken[i] != 0 && taken[j] != 0) sub[i * n + j] = gram[i * n + j];
        }
        if (taken[i] != 0) sub_cross[i] = cross[i];
      }
      taken[e] = 0;
      std::vector<double> alphas = SolveAlphas(sub, sub_cross);
      double error = target_square;
      for (size_t i = 0; i < n; ++i) error -= alphas[i] * sub_cross[i];
      if (error < least) {
        least = error;
        best = e;
        best_alphas = std::move(alphas);
      }
    }
    if (best == n) break;
    taken[best] = 1;
    choice.order.push_back(static_cast<int32_t>(best));
    choice.remaining.push_back(std::max(least, 0.0));
    choice.alphas.push_back(std::move(best_alphas));
  }
  return choice;
}

}  // namespace winnow
