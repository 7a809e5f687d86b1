// The memory budget: planned before, kept during, measured after.
// A verb lists what it will hold in a MemoryPlan; Require() throws ResourceError (exit 4) with the
// table and the smallest budget that works if it does not fit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace winnow {

struct MemoryItem {
  std::string what;
  uint64_t bytes = 0;
};

class MemoryPlan {
 public:
  void Add(std::string what, uint64_t bytes) { items_.push_back({std::move(what), bytes}); }
  const std::vector<MemoryItem>& items() const { return items_; }
  uint64_t total_bytes() const;
  // Human-readable table, one item a line and a total.
  std::string Table() const;
  void Require(uint64_t budget_bytes) const;

 private:
  std::vector<MemoryItem> items_;
};

// What the program itself needs before it holds any weight: code, libraries, stacks, allocator.
inline constexpr uint64_t kProgramBytes = uint64_t{24} << 20;

// Peak and current resident set of this process (VmHWM, VmRSS).
uint64_t PeakResidentBytes();
uint64_t ResidentBytes();
// Bytes this process asked the kernel to read so far (rchar of /proc/self/io), 0 where unknown.
uint64_t BytesReadByProcess();
// Memory that can be used now: the smaller of MemAvailable and what the cgroup leaves.
uint64_t AvailableMemoryBytes();
// The default of --max-memory: 80 % of AvailableMemoryBytes().
uint64_t DefaultMemoryBudget();

}  // namespace winnow
