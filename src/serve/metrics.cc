#include "serve/metrics.h"

#include <fmt/format.h>

#include "base/memory.h"

namespace winnow {
namespace {

void Describe(std::string& text, const char* name, const char* type, const char* help) {
  text += fmt::format("# HELP winnow_{} {}\n# TYPE winnow_{} {}\n", name, help, name, type);
}

template <typename T>
void AddCounter(std::string& text, const char* name, const char* help, T value) {
  Describe(text, name, "counter", help);
  text += fmt::format("winnow_{} {}\n", name, value);
}

template <typename T>
void AddGauge(std::string& text, const char* name, const char* help, T value) {
  Describe(text, name, "gauge", help);
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
  AddCounter(text, "prompt_tokens_total", "Prompt tokens computed.", c.prompt_tokens);
  AddCounter(text, "prompt_seconds_total", "Seconds spent on prompts.", c.prompt_seconds);
  AddCounter(text, "generated_tokens_total", "Tokens generated.", c.generated_tokens);
  AddCounter(text, "generation_seconds_total", "Seconds spent in decode steps.",
             c.generation_seconds);
  AddCounter(text, "decode_steps_total", "Decode steps.", c.decode_steps);
  AddCounter(text, "decode_step_sequences_total", "Sequences advanced by all decode steps.",
             c.decode_entries);
  AddCounter(text, "prefix_cache_lookups_total", "Sequences that looked for a known prefix.",
             c.prefix_lookups);
  AddCounter(text, "prefix_cache_hits_total", "Sequences that found one.", c.prefix_hits);
  AddCounter(text, "prefix_cache_tokens_total", "Prompt tokens that were not computed again.",
             c.prefix_tokens);
  AddCounter(text, "experts_used_total", "Experts run, over tokens and MoE layers.",
             c.experts_used);
  AddCounter(text, "experts_skipped_total", "Experts selected but skipped.", c.experts_skipped);
  AddCounter(text, "cancelled_requests_total", "Requests whose client went away.",
             c.cancelled_requests);
  AddCounter(text, "expired_requests_total", "Requests that met their deadline.",
             c.expired_requests);
  AddCounter(text, "refused_requests_total", "Requests refused because the queue was full.",
             c.refused_requests);
  AddCounter(text, "failed_requests_total", "Requests that ended with an error of the server.",
             c.failed_requests);
  AddGauge(text, "queued_requests", "Requests waiting for a slot.", c.queued_requests);
  AddGauge(text, "running_sequences", "Sequences in slots.", c.running_sequences);
  AddGauge(text, "slots", "Sequences that can run at once.", sizes_.slots);
  AddGauge(text, "context_tokens", "Most tokens of one sequence.", sizes_.context_tokens);
  AddGauge(text, "kv_cache_bytes", "Bytes of the key-value caches.", sizes_.kv_cache_bytes);
  AddGauge(text, "weight_bytes", "Bytes of the weights in memory.", sizes_.weight_bytes);
  AddGauge(text, "resident_bytes", "Resident memory of the process.", ResidentBytes());
  return text;
}

}  // namespace winnow
