#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace winnow {

struct ThreadPool::State {
  std::mutex mutex;
  std::condition_variable work_ready;
  std::condition_variable work_done;
  std::vector<std::thread> threads;
  uint64_t generation = 0;  // guarded by mutex; a new value means a new loop
  int running = 0;          // workers that have not finished the current loop
  bool stopping = false;
  const std::function<void(int64_t, int)>* body = nullptr;
  int64_t num_tasks = 0;
  std::atomic<int64_t> next_task{0};
  std::exception_ptr failure;  // guarded by mutex

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
    {
      std::unique_lock lock(state_->mutex);
      state_->work_ready.wait(lock, [&] { return state_->stopping || state_->generation != seen; });
      if (state_->stopping) return;
      seen = state_->generation;
    }
    state_->Work(worker);
    const std::lock_guard lock(state_->mutex);
    if (--state_->running == 0) state_->work_done.notify_one();
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
    state_->running = num_threads_ - 1;
    state_->failure = nullptr;
    ++state_->generation;
  }
  state_->work_ready.notify_all();
  state_->Work(0);
  std::exception_ptr failure;
  {
    std::unique_lock lock(state_->mutex);
    state_->work_done.wait(lock, [&] { return state_->running == 0; });
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
