#include "train/schedule.h"

#include <algorithm>
#include <cmath>

namespace winnow {

double LearningRate(const Schedule& schedule, int64_t step) {
  const auto total = static_cast<double>(schedule.total_steps), s = static_cast<double>(step);
  if (schedule.shape == ScheduleShape::kPublished) {
    constexpr double kFloor = 5e-6;
    return schedule.peak * std::max(kFloor, total > 0 ? 1 - s / total : 0.0);
  }
  const double warmup = std::ceil(schedule.warmup_share * total);
  if (s < warmup) return schedule.peak * (s + 1) / (warmup + 1);
  const double passed = (s - warmup) / std::max(1.0, total - warmup);
  double share = 1;
  if (schedule.shape == ScheduleShape::kLinear) share = 1 - passed;
  if (schedule.shape == ScheduleShape::kCosine) share = 0.5 * (1 + std::cos(M_PI * passed));
  return schedule.peak * (schedule.least_share + (1 - schedule.least_share) * share);
}

}  // namespace winnow
