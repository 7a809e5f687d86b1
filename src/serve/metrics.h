// Counters and gauges of the server, and their text for GET /metrics (Prometheus text format
// 0.0.4). Thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace winnow {

// What the scheduler adds up. Counters only grow; gauges say how it is now.
struct SchedulerCounts {
  uint64_t prompt_tokens = 0;  // computed, not those the prefix cache had
  double prompt_seconds = 0;
  uint64_t generated_tokens = 0;
  double generation_seconds = 0;  // in Decode
  uint64_t decode_steps = 0, decode_entries = 0;
  uint64_t prefix_lookups = 0, prefix_hits = 0, prefix_tokens = 0;
  uint64_t experts_used = 0, experts_skipped = 0;
  uint64_t cancelled_requests = 0, expired_requests = 0, refused_requests = 0, failed_requests = 0;
  int64_t queued_requests = 0, running_sequences = 0;  // gauges
};

// Sizes that do not change.
struct ServedSizes {
  int64_t slots = 0, context_tokens = 0;
  uint64_t weight_bytes = 0, kv_cache_bytes = 0;
};

class Metrics {
 public:
  explicit Metrics(ServedSizes sizes) : sizes_(sizes) {}
  // `endpoint` must come from a fixed list: every value is a line for ever.
  void CountRequest(const std::string& endpoint, int status);
  void Update(const SchedulerCounts& counts);
  SchedulerCounts counts() const;
  const ServedSizes& sizes() const { return sizes_; }
  std::string Text() const;

 private:
  const ServedSizes sizes_;
  mutable std::mutex mutex_;
  SchedulerCounts counts_;
  std::map<std::pair<std::string, int>, uint64_t> requests_;
};

}  // namespace winnow
