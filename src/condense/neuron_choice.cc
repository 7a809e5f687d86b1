#include "condense/neuron_choice.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
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

// Takes feature `pivot` out of what is left: everything becomes what it does not explain. Rows
// marked as taken and columns before `first_column` are left alone. Returns the error it explains.
double Eliminate(FeatureMoments& moments, int64_t pivot, int64_t first_column, double floor,
                 const std::vector<uint8_t>& taken, ThreadPool& pool) {
  const int64_t m = moments.num_features(), h = moments.hidden();
  double* gram = moments.gram();
  double* cross = moments.cross();
  const double diagonal = std::max(gram[pivot * m + pivot], floor);
  double explained = 0;
  for (int64_t i = 0; i < h; ++i) explained += cross[pivot * h + i] * cross[pivot * h + i];
  const double* row = gram + pivot * m;
  const double* target = cross + pivot * h;
  constexpr int64_t kRows = 32;
  pool.Run((m + kRows - 1) / kRows, [&](int64_t task, int) {
    for (int64_t i = task * kRows; i < std::min(m, (task + 1) * kRows); ++i) {
      if (i == pivot || taken[static_cast<size_t>(i)] != 0) continue;
      const double factor = gram[i * m + pivot] / diagonal;
      if (factor == 0) continue;
      Subtract(gram + i * m + first_column, factor, row + first_column, m - first_column);
      Subtract(cross + i * h, factor, target, h);
    }
  });
  return explained / diagonal;
}

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
  std::vector<uint8_t> taken;
  taken.assign(static_cast<size_t>(m), 0);
  NeuronChoice choice;
  for (int64_t i = 0; i < num_forced; ++i) {
    if (i % 64 == 0) control.Poll();
    error -= Eliminate(moments, i, i, floor, taken, pool);
    taken[static_cast<size_t>(i)] = 1;
  }
  choice.remaining.push_back(std::max(error, 0.0));
  std::vector<double> gain(static_cast<size_t>(m));
  while (std::ssize(choice.order) < std::min(count, m - num_forced)) {
    control.Poll();
    constexpr int64_t kRows = 64;
    pool.Run((m + kRows - 1) / kRows, [&](int64_t task, int) {
      for (int64_t i = task * kRows; i < std::min(m, (task + 1) * kRows); ++i) {
        double square = 0;
        for (int64_t c = 0; c < h; ++c) square += cross[i * h + c] * cross[i * h + c];
        gain[static_cast<size_t>(i)] =
            taken[static_cast<size_t>(i)] != 0 ? -1.0 : square / std::max(gram[i * m + i], floor);
      }
    });
    const int64_t best = std::max_element(gain.begin(), gain.end()) - gain.begin();
    error -= Eliminate(moments, best, num_forced, floor, taken, pool);
    taken[static_cast<size_t>(best)] = 1;
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
