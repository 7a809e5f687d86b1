// The learning rate of each step.
#pragma once

#include <cstdint>

namespace winnow {

enum class ScheduleShape : uint8_t {
  kConstant,
  kLinear,
  kCosine,
  // As CD-MoE's program has it: peak * max(5e-6, 1 - s / N) without warm-up, N whole batches; the
  // floor is a factor, and a partial batch at the end is step N.
  kPublished,
};

struct Schedule {
  ScheduleShape shape = ScheduleShape::kCosine;
  double peak = 1e-5;
  double warmup_share = 0.03;  // of all steps, rising from 0
  double least_share = 0.1;    // of the peak, at the end
  int64_t total_steps = 0;     // kPublished: N
};

double LearningRate(const Schedule& schedule, int64_t step);

}  // namespace winnow
