// Which neurons of a layer a narrower dense layer should have: forward selection by orthogonal
// least squares on the moments of all of them (feature_moments.h). Each step takes the neuron that,
// with those taken before and the best linear output weights for all, leaves the least error. The
// order is nested: its first n are the choice for n neurons.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/progress.h"             // JobControl
#include "base/thread_pool.h"          // ThreadPool
#include "condense/feature_moments.h"  // FeatureMoments

namespace winnow {

struct NeuronChoice {
  std::vector<int64_t> order;     // features in the order taken
  std::vector<double> remaining;  // [1 + order] error after the forced ones and after each step
};

// Features below `num_forced` are taken for free (the shared expert); up to `count` others are
// chosen. Destroys the moments. The moments are centred first (a constant is no achievement) and
// damped by 1e-3 of the mean diagonal.
NeuronChoice ChooseNeurons(FeatureMoments& moments, int64_t num_forced, int64_t count,
                           ThreadPool& pool, const JobControl& control);

// Whole experts instead, by orthogonal matching pursuit on their outputs: gram [E, E] of f_i . f_j,
// cross [E] of f_i . z, z the routed output, all summed over tokens with their weights.
struct ExpertChoice {
  std::vector<int32_t> order;
  std::vector<double> remaining;            // [1 + order]
  std::vector<std::vector<double>> alphas;  // [1 + order][E] least squares weights, 0 where absent
};
ExpertChoice ChooseExperts(std::span<const double> gram, std::span<const double> cross,
                           double target_square, int64_t count);

// Least-squares weights of groups of neurons: minimises the error of z - sum_g alpha_g z_g, where
// z_g is the output of group g with its own down projection. gram [G, G] and cross [G] as above;
// groups whose diagonal is 0 get 0.
std::vector<double> SolveAlphas(std::span<const double> gram, std::span<const double> cross);
// The error with weights `alphas`: target_square - 2 alphas . cross + alphas . gram alphas.
double ErrorOfAlphas(std::span<const double> gram, std::span<const double> cross,
                     double target_square, std::span<const double> alphas);

}  // namespace winnow
