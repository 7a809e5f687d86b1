#include "base/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>

#include "base/aligned_buffer.h"  // AskForHugePages
#include "base/error.h"
#include "base/units.h"

namespace winnow {
namespace {

// The number behind "Key:" in a /proc file.
std::optional<uint64_t> ProcValue(const char* path, std::string_view key) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind(key, 0) != 0) continue;
    const size_t digit = line.find_first_of("0123456789", key.size());
    if (digit == std::string::npos) return std::nullopt;
    uint64_t value = 0;
    std::from_chars(line.data() + digit, line.data() + line.size(), value);
    return value;
  }
  return std::nullopt;
}

std::optional<uint64_t> NumberInFile(const std::string& path) {
  std::ifstream in(path);
  uint64_t value = 0;
  if (in >> value) return value;
  return std::nullopt;
}

// The number behind `name` in a file of "name number" lines.
std::optional<uint64_t> NamedNumber(const std::string& path, const std::string& name) {
  std::ifstream in(path);
  std::string key;
  uint64_t value = 0;
  while (in >> key >> value) {
    if (key == name) return value;
  }
  return std::nullopt;
}

// What the cgroup (v2 or v1) still allows; nothing if unlimited or unknown.
std::optional<uint64_t> CgroupFreeBytes() {
  std::ifstream in("/proc/self/cgroup");
  std::string line;
  std::optional<uint64_t> smallest;
  const auto consider = [&](const std::string& limit_path, const std::string& usage_path,
                            const std::string& stat_path) {
    const auto limit = NumberInFile(limit_path);
    if (!limit || *limit > uint64_t{1} << 50) return;  // "max" or the v1 spelling of unlimited
    uint64_t usage = NumberInFile(usage_path).value_or(0);
    // Pages of files count as usage, but give way: after reading a large model they are most of it.
    usage -= std::min(usage, NamedNumber(stat_path, "inactive_file").value_or(0));
    const uint64_t free_bytes = *limit > usage ? *limit - usage : 0;
    smallest = std::min(smallest.value_or(free_bytes), free_bytes);
  };
  while (std::getline(in, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    for (;;) {  // a parent's limit binds too
      if (controllers.empty()) {
        const std::string folder = "/sys/fs/cgroup" + path;
        consider(folder + "/memory.max", folder + "/memory.current", folder + "/memory.stat");
      } else if (controllers.find("memory") != std::string::npos) {
        const std::string folder = "/sys/fs/cgroup/memory" + path;
        consider(folder + "/memory.limit_in_bytes", folder + "/memory.usage_in_bytes",
                 folder + "/memory.stat");
      }
      if (path.empty() || path == "/") break;
      path.resize(path.find_last_of('/'));
    }
  }
  return smallest;
}

}  // namespace

uint64_t MemoryPlan::total_bytes() const {
  uint64_t total = 0;
  for (const MemoryItem& item : items_) total += item.bytes;
  return total;
}

std::string MemoryPlan::Table() const {
  std::string table;
  for (const MemoryItem& item : items_) {
    table += fmt::format("  {:<44} {:>10}\n", item.what, FormatBytes(item.bytes));
  }
  return table + fmt::format("  {:<44} {:>10}\n", "total", FormatBytes(total_bytes()));
}

void MemoryPlan::Require(uint64_t budget_bytes) const {
  if (total_bytes() <= budget_bytes) return;
  const uint64_t mebibytes = (total_bytes() + (uint64_t{1} << 20) - 1) >> 20;
  throw ResourceError(fmt::format("this needs {} of memory, {} are allowed:\n{}",
                                  FormatBytes(total_bytes()), FormatBytes(budget_bytes), Table()),
                      fmt::format("the smallest budget that works is --max-memory {}M", mebibytes));
}

void AskForHugePages(void* data, size_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

uint64_t PeakResidentBytes() {
  return ProcValue("/proc/self/status", "VmHWM:").value_or(0) * 1024;
}

uint64_t ResidentBytes() {
  return ProcValue("/proc/self/status", "VmRSS:").value_or(0) * 1024;
}

uint64_t BytesReadByProcess() {
  return ProcValue("/proc/self/io", "rchar:").value_or(0);
}

uint64_t AvailableMemoryBytes() {
  const uint64_t machine = ProcValue("/proc/meminfo", "MemAvailable:").value_or(4 << 20) * 1024;
  return std::min(machine, CgroupFreeBytes().value_or(machine));
}

uint64_t DefaultMemoryBudget() {
  return AvailableMemoryBytes() / 5 * 4;
}

}  // namespace winnow
