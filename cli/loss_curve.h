// The loss of every step as a picture: a small SVG that reads on light and dark pages.
#pragma once

#include <string>
#include <vector>

#include "train/train_run.h"  // StepRecord

namespace winnow::cli {

std::string LossCurve(const std::vector<StepRecord>& steps, std::optional<double> held_out_before);

}  // namespace winnow::cli
