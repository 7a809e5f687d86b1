#include "serve/generation.h"

namespace winnow {
namespace {

// A copy that shares nothing: copied exceptions share their text, which another thread may drop.
ApiError CopyForThread(const ApiError& error) {
  return ApiError(error.status(), error.code(), std::string(error.what()), error.param());
}

}  // namespace

std::optional<SequenceEvent> Generation::Next(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, patience,
                    [&] { return !events_.empty() || failure_ || unfinished_ == 0; });
  if (!events_.empty()) {
    SequenceEvent event = std::move(events_.front());
    events_.pop_front();
    return event;
  }
  if (failure_) throw CopyForThread(*failure_);
  return {};
}

bool Generation::finished() const {
  const std::lock_guard lock(mutex_);
  return events_.empty() && unfinished_ == 0;
}

void Generation::Put(SequenceEvent event) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return;
    if (event.finished) --unfinished_;
    events_.push_back(std::move(event));
  }
  changed_.notify_all();
}

void Generation::Fail(const ApiError& error) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_ || unfinished_ == 0) return;
    failure_.emplace(CopyForThread(error));
  }
  changed_.notify_all();
}

bool Generation::failed() const {
  const std::lock_guard lock(mutex_);
  return failure_.has_value();
}

}  // namespace winnow
