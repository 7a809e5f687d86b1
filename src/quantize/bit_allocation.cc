#include "quantize/bit_allocation.h"

#include <fmt/format.h>

#include <queue>
#include <tuple>

#include "base/checked_math.h"
#include "base/error.h"
#include "base/units.h"

namespace winnow {
namespace {

double At(const AllocationItem& item, int32_t candidate) {
  return item.error[static_cast<size_t>(candidate)];
}
uint64_t BytesAt(const AllocationItem& item, int32_t candidate) {
  return item.bytes[static_cast<size_t>(candidate)];
}

// A step of one item from a candidate to a larger one.
struct Step {
  double gain_per_byte = 0;
  size_t item = 0;
  int32_t from = 0, to = 0;

  // priority_queue takes the largest: more gain first, then the earlier item.
  bool operator<(const Step& other) const {
    return std::tuple(gain_per_byte, other.item) < std::tuple(other.gain_per_byte, item);
  }
};

// The next vertex of the item's lower convex hull after `from`: the candidate of the steepest fall,
// of equal ones the furthest.
Step NextOnHull(std::span<const AllocationItem> items, size_t index, int32_t from) {
  const AllocationItem& item = items[index];
  Step best{.gain_per_byte = 0, .item = index, .from = from, .to = from};
  for (int32_t to = from + 1; to < static_cast<int32_t>(item.error.size()); ++to) {
    const uint64_t bytes = BytesAt(item, to) - BytesAt(item, from);
    const double fall = At(item, from) - At(item, to);
    if (bytes == 0 || !(fall > 0)) continue;
    const double rate = fall / static_cast<double>(bytes);
    if (rate >= best.gain_per_byte) {
      best.gain_per_byte = rate;
      best.to = to;
    }
  }
  return best;
}

Allocation Uniform(std::span<const AllocationItem> items, int32_t candidate) {
  Allocation all;
  all.choice.assign(items.size(), candidate);
  for (const AllocationItem& item : items) {
    all.bytes = CheckedAdd(all.bytes, BytesAt(item, candidate), "experts");
    all.error += At(item, candidate);
  }
  return all;
}

double ErrorOf(std::span<const AllocationItem> items, const std::vector<int32_t>& choice) {
  double error = 0;
  for (size_t i = 0; i < items.size(); ++i) error += At(items[i], choice[i]);
  return error;
}

}  // namespace

Allocation AllocateBits(std::span<const AllocationItem> items, uint64_t budget) {
  if (items.empty()) return {};
  Allocation result = Uniform(items, 0);
  if (result.bytes > budget) {
    throw UsageError(fmt::format("the experts take {} at the fewest bits, {} are left for them",
                                 FormatBytes(result.bytes), FormatBytes(budget)),
                     "give a larger --size, or fewer bits to the rest (--rest)");
  }
  Allocation uniform = result;
  int32_t uniform_choice = 0;
  for (int32_t c = 1; c < static_cast<int32_t>(items.front().bytes.size()); ++c) {
    Allocation next = Uniform(items, c);
    if (next.bytes > budget || !(next.error < uniform.error)) continue;
    uniform = std::move(next);
    uniform_choice = c;
  }
  std::priority_queue<Step> steps;
  const auto offer = [&](size_t item, int32_t from) {
    const Step step = NextOnHull(items, item, from);
    if (step.to != from) steps.push(step);
  };
  for (size_t i = 0; i < items.size(); ++i) offer(i, 0);
  while (!steps.empty()) {
    const Step step = steps.top();
    steps.pop();
    const AllocationItem& item = items[step.item];
    // The furthest candidate up to the hull's that fits and gains.
    for (int32_t to = step.to; to > step.from; --to) {
      const uint64_t bytes = BytesAt(item, to) - BytesAt(item, step.from);
      if (bytes > budget - result.bytes || !(At(item, to) < At(item, step.from))) continue;
      result.choice[step.item] = to;
      result.bytes += bytes;
      offer(step.item, to);
      break;
    }
  }
  result.error = ErrorOf(items, result.choice);
  if (uniform.error < result.error) result = uniform;
  result.uniform_error = uniform.error;
  result.uniform_choice = uniform_choice;
  return result;
}

}  // namespace winnow
