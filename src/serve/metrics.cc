#include "serve/metrics.h"

#include <fmt/format.h>

#include "base/memory.h"

namespace winnow {
namespace {

void Describe(std::string& text, const char* name, const char* type, const char* help) {
  text += fmt::format("# HELP winnow_{} {}\n# TYPE winnow_{} {}\n", name, help, name, type);
}

template <typename T>
void Add(std::string& text, const char* name, const char* type, const char* help, T value) {
  Describe(text, name, type, help);
  text += fmt::format("winnow_{} {}\n", name, value);
}

}  // namespace

void Metrics::CountRequest(const std::string& endpoint, int status) {
  const std::lock_guard lock(mutex_);
  ++requests_[{endpoint, status}];
}

void Metrics::Update(const SchedulerCounts& counts) {
  const std::lock_guard lock(mutex_);
  counts_ = counts;
}

SchedulerCounts Metrics::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

std::string Metrics::Text() const {
  const std::lock_guard lock(mutex_);
  const SchedulerCounts& c = counts_;
  std::string text;
  Describe(text, "http_requests_total", "counter", "Answered requests by endpoint and status.");
  for (const auto& [key, count] : requests_) {
    text += fmt::format("winnow_http_requests_total{{endpoint=\"{}\",status=\"{}\"}} {}\n",
                        key.first, key.second, count);
  }
  Add(text, "prompt_tokens_total", "counter", "Prompt tokens computed.", c.prompt_tokens);
  Add(text, "prompt_seconds_total", "counter", "Seconds spent on prompts.", c.prompt_seconds);
  Add(text, "generated_tokens_total", "counter", "Tokens generated.", c.generated_tokens);
  Add(text, "generation_seconds_total", "counter", "Seconds spent in decode steps.",
      c.generation_seconds);
  Add(text, "decode_steps_total", "counter", "Decode steps.", c.decode_steps);
  Add(text, "decode_step_sequences_total", "counter", "Sequences advanced by all decode steps.",
      c.decode_entries);
  Add(text, "prefix_cache_lookups_total", "counter", "Sequences that looked for a known prefix.",
      c.prefix_lookups);
  Add(text, "prefix_cache_hits_total", "counter", "Sequences that found one.", c.prefix_hits);
  Add(text, "prefix_cache_tokens_total", "counter", "Prompt tokens that were not computed again.",
      c.prefix_tokens);
  Add(text, "experts_used_total", "counter", "Experts run, over tokens and MoE layers.",
      c.experts_used);
  Add(text, "experts_skipped_total", "counter", "Experts selected but skipped.", c.experts_skipped);
  Add(text, "cancelled_requests_total", "counter", "Requests whose client went away.",
      c.cancelled_requests);
  Add(text, "expired_requests_total", "counter", "Requests that met their deadline.",
      c.expired_requests);
  Add(text, "refused_requests_total", "counter", "Requests refused because the queue was full.",
      c.refused_requests);
  Add(text, "failed_requests_total", "counter", "Requests that ended with an error of the server.",
      c.failed_requests);
  Add(text, "queued_requests", "gauge", "Requests waiting for a slot.", c.queued_requests);
  Add(text, "running_sequences", "gauge", "Sequences in slots.", c.running_sequences);
  Add(text, "slots", "gauge", "Sequences that can run at once.", sizes_.slots);
  Add(text, "context_tokens", "gauge", "Most tokens of one sequence.", sizes_.context_tokens);
  Add(text, "kv_cache_bytes", "gauge", "Bytes of the key-value caches.", sizes_.kv_cache_bytes);
  Add(text, "weight_bytes", "gauge", "Bytes of the weights in memory.", sizes_.weight_bytes);
  Add(text, "resident_bytes", "gauge", "Resident memory of the process.", ResidentBytes());
  return text;
}

}  // namespace winnow
