// Parallel loops over tasks of unequal size, and the number of threads for loops whose threads wait for one
// another.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace icae_fast {

// Threads that can run at once: at::get_num_threads, or the number of CPUs that this process may use if it is
// lower. Where threads wait for one another, one without a CPU keeps all others waiting. OpenMP counts CPUs before
// it binds threads to them, which the calling thread's own affinity would not show.
inline int64_t running_threads() {
  const int64_t threads = at::get_num_threads();
#if defined(_OPENMP)
  return std::max<int64_t>(1, std::min<int64_t>(threads, omp_get_num_procs()));
#else
  return threads;
#endif
}

// Call f(begin, end) for ranges of `rows` rows with about `row_size` elements each.
template <class F>
void for_rows(int64_t rows, int64_t row_size, const F& f) {
  constexpr int64_t kElementsPerTask = 1 << 15;  // about 10 us of work, against 5 us to wake a thread
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, row_size));
  at::parallel_for(0, rows, grain, f);
}

// Upper bound of the `worker` that for_each_task passes.
inline int64_t max_workers(int64_t tasks) {
  return std::max<int64_t>(1, std::min<int64_t>(tasks, at::get_num_threads()));
}

// Call f(task, worker) once for each task. A thread takes the next task when it has finished one, since causal
// tiles differ in size by up to the length of a row. Results must not depend on which thread runs a task. Workers
// are numbered here, because at::get_thread_num can return any number inside a caller's parallel region.
template <class F>
void for_each_task(int64_t tasks, const F& f) {
  if (tasks == 0) return;
  std::atomic<int64_t> next_task{0}, next_worker{0};
  at::parallel_for(0, max_workers(tasks), 1, [&](int64_t, int64_t) {
    const int64_t worker = next_worker++;
    for (int64_t task = next_task++; task < tasks; task = next_task++) f(task, worker);
  });
}

}  // namespace icae_fast
