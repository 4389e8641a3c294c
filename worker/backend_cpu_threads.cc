#include "worker/backend_cpu_threads.h"

#include <ATen/Parallel.h>

namespace refocus {

int64_t CpuThreads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void RunOnCpuThreads(void (*body)(void* context, int64_t thread), void* context) {
  const int64_t threads = CpuThreads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(context, thread);
  });
}

}  // namespace refocus
