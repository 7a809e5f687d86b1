// A fixed set of worker threads for data-parallel loops. Passed by reference down the call chain;
// never global. Results must not depend on the number of threads: tasks write disjoint outputs and
// sums over tokens are taken in a fixed order by their owner.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace winnow {

class ThreadPool {
 public:
  // `num_threads` counts the caller; 1 means no extra threads. 0 takes the CPUs this process may
  // use.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(task, worker) once for every task in [0, num_tasks), worker in [0, num_threads()).
  // Returns when all are done. The first exception thrown by a task is rethrown here after the
  // others have stopped. Not reentrant: a body must not call Run on the same pool.
  void Run(int64_t num_tasks, const std::function<void(int64_t task, int worker)>& body);

 private:
  struct State;
  void WorkerLoop(int worker);
  int num_threads_;
  std::unique_ptr<State> state_;
};

// CPUs this process may run on (affinity and cgroup quota), at least 1.
int AvailableCpus();

}  // namespace winnow
