// Work sharing on LibTorch's own OpenMP team, so that the backend and LibTorch's operators never run on twice the
// threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace refocus {

// Threads that ParallelTasks may use when called from here, the caller included: at::get_num_threads(), 1 inside a
// parallel region.
int64_t CpuThreads();

// Runs body(context, thread) once on each of CpuThreads() threads, thread in [0, CpuThreads()), and waits. With one
// thread it is a plain call and no thread is started. body must not throw.
void RunOnCpuThreads(void (*body)(void* context, int64_t thread), void* context);

// task(index, thread) for every index in [0, count), each once, in rising order of start; waits for all. Which thread
// runs which index is not defined: results must not depend on it. `task` must not throw.
template <typename Task>
void ParallelTasks(int64_t count, const Task& task) {
  if (count <= 0) return;
  if (count == 1 || CpuThreads() == 1) {
    for (int64_t index = 0; index < count; ++index) task(index, 0);
    return;
  }
  // The two atomics also order memory for readers that do not know OpenMP's barriers (ThreadSanitizer).
  struct Shared {
    const Task* task;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> left{0};
  } shared;
  shared.task = &task;
  shared.count = count;
  shared.next.store(0, std::memory_order_release);
  RunOnCpuThreads(
      [](void* context, int64_t thread) {
        auto* const work = static_cast<Shared*>(context);
        for (;;) {
          const int64_t index = work->next.fetch_add(1, std::memory_order_acq_rel);
          if (index >= work->count) break;
          (*work->task)(index, thread);
        }
        work->left.fetch_add(1, std::memory_order_acq_rel);
      },
      &shared);
  shared.left.load(std::memory_order_acquire);
}

}  // namespace refocus
