// What rounding each expert to each candidate format would cost, and the plan of least cost within
// a size. Measured on calibration text with the model as it is: for a sample of an expert's tokens,
// the squared difference of its whole output (gate, up and down rounded plainly), times routing
// weight squared, over the squared length of the stream it is added to. Or, without text, from the
// weights and what a statistics folder knows of their use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "quantize/bit_allocation.h"  // Allocation
#include "quantize/calibrated_run.h"  // CalibrateOptions, CalibratePlan

namespace winnow {

struct LayerErrors {
  int32_t layer = 0;
  std::vector<std::vector<double>> error;  // [E][candidates]
};

// `candidates` from few bits to many.
std::vector<LayerErrors> MeasureExpertErrors(const Model& model,
                                             const std::vector<PackedFormat>& candidates,
                                             const CalibrateOptions& options,
                                             const CalibratePlan& plan, const fs::path& spill_file,
                                             ThreadPool& pool, const JobControl& control);

// Without text: an expert's relative error of its weights (of its three matrices, added), times
// `use` [layers][E]: how much of the layer's output is its own, e.g. tokens times the square of
// their mean routing weight. Layers without a router are left out, `use` has one entry for each of
// the others.
std::vector<LayerErrors> WeightErrors(const Model& model,
                                      const std::vector<PackedFormat>& candidates,
                                      const std::vector<std::vector<double>>& use, ThreadPool& pool,
                                      const JobControl& control);

// The plan whose experts have the least sum of errors while all files of the new checkpoint
// together take at most `size` bytes. `plan` says the formats of everything else. `allocation`, if
// given, gets the figures.
QuantizePlan AllocateToSize(const Model& model, const QuantizePlan& plan,
                            const std::vector<PackedFormat>& candidates,
                            const std::vector<LayerErrors>& errors, uint64_t size,
                            Allocation* allocation);

}  // namespace winnow
