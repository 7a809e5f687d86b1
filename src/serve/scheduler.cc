#include "serve/scheduler.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/checked_math.h"
#include "forward/expert_skipping.h"

namespace winnow {
namespace {

double SecondsSince(Generation::Clock::time_point start) {
  return std::chrono::duration<double>(Generation::Clock::now() - start).count();
}

ApiError Stopping() {
  return ApiError(503, "stopping", "the server is stopping");
}

}  // namespace

Scheduler::Scheduler(SequenceRunner& runner, const Tokenizer& tokenizer, SchedulerOptions options,
                     Metrics& metrics)
    : runner_(runner),
      tokenizer_(tokenizer),
      options_(std::move(options)),
      metrics_(metrics),
      slots_(runner.slots()),
      logits_(CheckedMul(static_cast<uint64_t>(runner.slots()),
                         static_cast<uint64_t>(runner.vocab_size()), "logits of all slots")) {}

std::shared_ptr<Generation> Scheduler::Submit(
    std::vector<SequenceSpec> specs, std::optional<Generation::Clock::time_point> deadline) {
  const int64_t context = runner_.context_tokens();
  int64_t tokens = 0;
  for (SequenceSpec& spec : specs) {
    const auto length = static_cast<int64_t>(spec.prompt.size());
    if (length == 0) {
      throw ApiError(400, "empty_prompt", "prompt: it has no tokens; give at least one", "prompt");
    }
    if (length > context) {
      throw ApiError(
          400, "context_length_exceeded",
          fmt::format("prompt: {} tokens, but the context of this server has {}", length, context),
          "prompt");
    }
    // The last token drawn is never given back to the model, so it needs no room.
    spec.max_tokens = std::min(spec.max_tokens, context - length + 1);
    tokens += length;
  }
  auto made = std::make_unique<Generation>(std::move(specs), deadline);
  *prompt_tokens_ += tokens;
  const std::shared_ptr<Generation> generation(
      made.release(), [held = prompt_tokens_, tokens](const Generation* ended) {
        delete ended;
        *held -= tokens;
      });
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw Stopping();
    const int64_t held = *prompt_tokens_;
    if (held > options_.max_prompt_tokens && held > tokens) {
      ++refused_;
      throw ApiError(429, "queue_full",
                     fmt::format("requests with {} prompt tokens are here already; try again later",
                                 held - tokens));
    }
    if (static_cast<int64_t>(queue_.size()) >= options_.max_queued_requests) {
      ++refused_;
      throw ApiError(
          429, "queue_full",
          fmt::format("{} requests are waiting already; try again later", queue_.size()));
    }
    queue_.push_back({generation});
  }
  changed_.notify_all();
  return generation;
}

void Scheduler::BeginStop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    // A request that has begun with some of its sequences ends like those that have not begun: it
    // could not be answered in full.
    for (Waiting& waiting : queue_) waiting.generation->Fail(Stopping());
    queue_.clear();
  }
  changed_.notify_all();
}

bool Scheduler::EndIfUnwanted(Generation& generation) {
  if (generation.failed()) return true;
  if (generation.cancelled()) {
    ++counts_.cancelled_requests;
    generation.Fail(ApiError(503, "cancelled", "the client went away"));
  } else if (options_.abandoned != nullptr && *options_.abandoned) {
    generation.Fail(Stopping());
  } else if (generation.deadline() && options_.now() >= *generation.deadline()) {
    ++counts_.expired_requests;
    generation.Fail(ApiError(503, "timeout", "the request met its deadline before it was done"));
  } else {
    return false;
  }
  return true;
}

void Scheduler::EndWithoutClient() {
  for (Running& sequence : running_) EndIfUnwanted(sequence->generation());
  const std::lock_guard lock(mutex_);
  std::erase_if(queue_, [&](Waiting& waiting) { return EndIfUnwanted(*waiting.generation); });
}

void Scheduler::Admit() {
  const std::lock_guard lock(mutex_);
  while (!queue_.empty()) {
    Waiting& first = queue_.front();
    const std::vector<SequenceSpec>& specs = first.generation->specs();
    const std::optional<int64_t> slot = slots_.Claim(specs[first.next].prompt);
    if (!slot) return;
    running_.push_back(std::make_unique<RunningSequence>(first.generation, first.next, *slot,
                                                         tokenizer_, options_.vocabulary));
    if (++first.next == specs.size()) queue_.pop_front();
  }
}

void Scheduler::PrepareSlot(RunningSequence& sequence) {
  sequence.started = true;
  const bool scored = sequence.spec().score_prompt;
  SlotTable::Prefix prefix;
  if (options_.reuse_prefixes) prefix = slots_.Longest(sequence.spec().prompt, scored);
  if (prefix.length == 0 || prefix.slot == sequence.slot()) {
    runner_.Truncate(sequence.slot(), prefix.length);
  } else {
    runner_.CopyPrefix(prefix.slot, sequence.slot(), prefix.length);
  }
  slots_.Take(sequence.slot(), prefix, scored);
  sequence.timings().cached_tokens = prefix.length;
  ++counts_.prefix_lookups;
  if (prefix.length > 0) ++counts_.prefix_hits;
  counts_.prefix_tokens += static_cast<uint64_t>(prefix.length);
}

void Scheduler::PrefillChunk(RunningSequence& sequence) {
  const SequenceSpec& spec = sequence.spec();
  const int64_t slot = sequence.slot(), begin = slots_.length(slot);
  const auto length = static_cast<int64_t>(spec.prompt.size());
  const int64_t end = std::min(length, (begin / options_.chunk_tokens + 1) * options_.chunk_tokens);
  const bool last = end == length;
  const auto ids =
      std::span(spec.prompt).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  const int64_t wanted = spec.score_prompt ? end - begin : (last && spec.max_tokens > 0 ? 1 : 0);
  // Scores beyond what any request may ask for, so that the next one can use them too.
  constexpr int kKeptLikeliest = 5;
  std::vector<float> last_logits;
  const auto start = Generation::Clock::now();
  runner_.Prefill(slot, ids, wanted, [&](int64_t index, std::span<const float> logits) {
    const int64_t next = begin + index + 1;
    if (next == length) {
      last_logits.assign(logits.begin(), logits.end());
    } else {
      slots_.AddScore(
          slot, ScorePosition(logits, spec.prompt[static_cast<size_t>(next)], kKeptLikeliest));
    }
  });
  const double seconds = SecondsSince(start);
  slots_.Append(slot, ids);
  sequence.timings().prompt_seconds += seconds;
  counts_.prompt_seconds += seconds;
  counts_.prompt_tokens += static_cast<uint64_t>(ids.size());
  CountExperts();
  if (!last) return;
  sequence.FinishPrompt(spec.score_prompt ? slots_.scores(slot) : std::vector<PositionScore>{});
  if (sequence.finished()) return;
  ++counts_.generated_tokens;
  sequence.Accept(last_logits, ExpertsOf(static_cast<int64_t>(ids.size()) - 1));
}

bool Scheduler::PrefillOne() {
  for (Running& sequence : running_) {
    if (sequence->finished() || sequence->decoding() || sequence->generation().failed()) continue;
    try {
      if (!sequence->started) PrepareSlot(*sequence);
      PrefillChunk(*sequence);
    } catch (const std::exception& error) {
      // What the slot holds is not known any more.
      slots_.Clear(sequence->slot());
      Fail(sequence->generation(), error);
    }
    return true;
  }
  return false;
}

bool Scheduler::DecodeAll() {
  std::vector<RunningSequence*> active;
  std::vector<DecodeEntry> entries;
  for (Running& sequence : running_) {
    if (!sequence->decoding() || sequence->generation().failed()) continue;
    active.push_back(sequence.get());
    entries.push_back({sequence->slot(), sequence->next_token()});
  }
  if (active.empty()) return false;
  const auto v = static_cast<size_t>(runner_.vocab_size());
  const auto logits = std::span(logits_).first(entries.size() * v);
  const auto start = Generation::Clock::now();
  try {
    runner_.Decode(entries, logits);
  } catch (const std::exception& error) {
    for (RunningSequence* sequence : active) {
      slots_.Clear(sequence->slot());
      Fail(sequence->generation(), error);
    }
    return true;
  }
  const double seconds = SecondsSince(start);
  ++counts_.decode_steps;
  counts_.decode_entries += entries.size();
  counts_.generation_seconds += seconds;
  CountExperts();
  for (size_t i = 0; i < active.size(); ++i) {
    active[i]->timings().generation_seconds += seconds;
    ++counts_.generated_tokens;
    try {
      active[i]->Accept(logits.subspan(i * v, v), ExpertsOf(static_cast<int64_t>(i)));
    } catch (const std::exception& error) {
      Fail(active[i]->generation(), error);
    }
  }
  return true;
}

TokenExperts Scheduler::ExpertsOf(int64_t token) const {
  const ExpertUse& use = runner_.last_experts();
  const auto stride = static_cast<size_t>(use.moe_layers * use.experts_per_token);
  const size_t begin = static_cast<size_t>(token) * stride;
  if (begin + stride > use.ids.size()) return {};
  const auto first = use.ids.begin() + static_cast<std::ptrdiff_t>(begin);
  return {first, first + static_cast<std::ptrdiff_t>(stride)};
}

void Scheduler::CountExperts() {
  for (const int32_t id : runner_.last_experts().ids) {
    ++(IsSkipped(id) ? counts_.experts_skipped : counts_.experts_used);
  }
}

void Scheduler::Fail(Generation& generation, const std::exception& error) {
  const ApiError told = AsApiError(error);
  generation.Fail(told);
  if (told.status() != 500) return;
  ++counts_.failed_requests;
  if (options_.on_fault) options_.on_fault(error.what());
}

void Scheduler::RemoveFinished() {
  for (auto at = running_.begin(); at != running_.end();) {
    RunningSequence& sequence = **at;
    if (!sequence.finished() && !sequence.generation().failed()) {
      ++at;
      continue;
    }
    // Generated tokens are forgotten: Decode computed them.
    runner_.Truncate(sequence.slot(), slots_.length(sequence.slot()));
    slots_.Release(sequence.slot());
    at = running_.erase(at);
  }
}

void Scheduler::Publish() {
  {
    const std::lock_guard lock(mutex_);
    counts_.queued_requests = static_cast<int64_t>(queue_.size());
    counts_.refused_requests = refused_;
  }
  counts_.running_sequences = static_cast<int64_t>(running_.size());
  metrics_.Update(counts_);
}

bool Scheduler::Step() {
  EndWithoutClient();
  RemoveFinished();
  Admit();
  const bool prefilled = PrefillOne();
  const bool decoded = DecodeAll();
  RemoveFinished();
  Publish();
  return prefilled || decoded;
}

void Scheduler::Run() {
  while (true) {
    try {
      if (Step()) continue;
    } catch (const std::exception& error) {  // out of memory, say: every client is told
      for (Running& sequence : running_) Fail(sequence->generation(), error);
      continue;
    }
    std::unique_lock lock(mutex_);
    if (stopping_ && queue_.empty() && running_.empty()) return;
    changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
  }
}

}  // namespace winnow
