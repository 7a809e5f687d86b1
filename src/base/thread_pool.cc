#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace winnow {

// A loop is open from its start until the caller finds no task left. Workers enter an open loop;
// one that comes too late, because its core was busy with something else, finds it closed, and
// nobody waits for it. So a loaded machine slows a loop by the share of its cores it lost, not by
// the time until every worker had its turn.
struct ThreadPool::State {
  // Of `loop`: workers inside, whether it is closed, and its number.
  static constexpr uint64_t kInside = (1 << 16) - 1;
  static constexpr uint64_t kClosed = 1 << 16;
  static constexpr uint64_t kNext = 1 << 17;

  std::mutex mutex;
  std::condition_variable work_ready;
  std::condition_variable work_done;
  std::vector<std::thread> threads;
  std::atomic<uint64_t> loop{kClosed};
  std::atomic<bool> stopping{false};
  // Of the open loop; changed only while no worker is inside and none can enter.
  const std::function<void(int64_t, int)>* body = nullptr;
  int64_t num_tasks = 0;
  std::atomic<int64_t> next_task{0};
  std::exception_ptr failure;  // guarded by mutex

  bool CanEnter(uint64_t seen) const {
    const uint64_t now = loop.load(std::memory_order_acquire);
    return (now & kClosed) == 0 && now / kNext != seen;
  }
  // False if the loop was closed meanwhile. `seen`: its number.
  bool Enter(uint64_t* seen) {
    uint64_t now = loop.load(std::memory_order_acquire);
    while ((now & kClosed) == 0 && now / kNext != *seen) {
      if (loop.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
        *seen = now / kNext;
        return true;
      }
    }
    return false;
  }
  void Leave() {
    const uint64_t left = loop.fetch_sub(1, std::memory_order_acq_rel) - 1;
    if ((left & kClosed) == 0 || (left & kInside) != 0) return;
    // Under the mutex, so that it does not fall between the caller's look and its sleep.
    const std::lock_guard lock(mutex);
    work_done.notify_one();
  }

  void Work(int worker) {
    try {
      for (;;) {
        const int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
        if (task >= num_tasks) return;
        (*body)(task, worker);
      }
    } catch (...) {
      next_task.store(num_tasks, std::memory_order_relaxed);
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  }
};

namespace {

// Loops of a decoded token follow each other within microseconds, and waking a thread costs as much
// as such a loop: whoever waits looks for this long before it sleeps. Not longer, because a core
// may be shared, and then who spins keeps the one it waits for from running.
constexpr auto kSpin = std::chrono::microseconds(30);

template <class Ready>
void SpinUntil(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
      __builtin_ia32_pause();
    }
    if (std::chrono::steady_clock::now() >= end) return;
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads > 0 ? num_threads : AvailableCpus()),
      state_(std::make_unique<State>()) {
  for (int worker = 1; worker < num_threads_; ++worker) {
    state_->threads.emplace_back([this, worker] { WorkerLoop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work_ready.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

void ThreadPool::WorkerLoop(int worker) {
  uint64_t seen = 0;
  for (;;) {
    const auto ready = [&] { return state_->stopping || state_->CanEnter(seen); };
    SpinUntil(ready);
    if (!ready()) {
      std::unique_lock lock(state_->mutex);
      state_->work_ready.wait(lock, ready);
    }
    if (state_->stopping) return;
    if (!state_->Enter(&seen)) continue;
    state_->Work(worker);
    state_->Leave();
  }
}

void ThreadPool::Run(int64_t num_tasks, const std::function<void(int64_t, int)>& body) {
  if (num_tasks <= 0) return;
  if (num_threads_ == 1 || num_tasks == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->body = &body;
    state_->num_tasks = num_tasks;
    state_->next_task.store(0, std::memory_order_relaxed);
    state_->failure = nullptr;
    const uint64_t closed = state_->loop.load(std::memory_order_relaxed);
    state_->loop.store((closed / State::kNext + 1) * State::kNext, std::memory_order_release);
  }
  state_->work_ready.notify_all();
  state_->Work(0);
  state_->loop.fetch_or(State::kClosed, std::memory_order_acq_rel);
  std::exception_ptr failure;
  {
    const auto done = [&] {
      return (state_->loop.load(std::memory_order_acquire) & State::kInside) == 0;
    };
    SpinUntil(done);
    std::unique_lock lock(state_->mutex);
    state_->work_done.wait(lock, done);
    failure = state_->failure;
  }
  if (failure) std::rethrow_exception(failure);
}

int AvailableCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace winnow
