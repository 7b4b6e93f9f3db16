// Work that goes on phase after phase on one set of threads: a token step has some two hundred phases of 30 us or
// so, and opening a parallel region for each would cost as much as a tenth of it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace icae_fast {

// Threads take tasks of a phase until there are none, and go on when all of them are done, whoever did them. So it
// does not matter how many threads come, nor when: one alone does everything, and one that comes late finds the
// first phases done. Each thread has a `Worker` of its own.
class Phases {
 public:
  explicit Phases(int64_t n) : phases_(n + 1) {}

  class Worker {
   public:
    explicit Worker(Phases& phases) : phases_(phases) {}

    // Runs f(task) for the tasks of the next phase that this thread takes; `before()` first, if it takes any. Then,
    // until all are done, `idle(task)` again and again, with the task of the phase after this one that this thread
    // will begin with (there may be none of that number). What the phase wrote is seen by all who return from it.
    template <class Before, class F, class Idle>
    void run(int64_t tasks, const Before& before, const F& f, const Idle& idle) {
      auto &now = phases_.phases_[phase_++], &then = phases_.phases_[phase_];
      int64_t task = first_ < 0 ? now.next++ : first_, mine = 0;
      for (; task < tasks; task = now.next++, ++mine) {
        if (mine == 0) before();
        f(task);
      }
      if (mine > 0) now.done.fetch_add(mine, std::memory_order_acq_rel);
      first_ = then.next++;
      for (int64_t spins = 0; now.done.load(std::memory_order_acquire) < tasks; ++spins) {
        if (!idle(first_)) pause(spins);
      }
    }

   private:
    Phases& phases_;
    int64_t phase_ = 0, first_ = -1;
  };

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };

  static void pause(int64_t spins) {
    constexpr int64_t kSpins = 1 << 12;  // some 100 us; then this thread may be in the way of the one it waits for
    if (spins > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  std::vector<Phase> phases_;
};

// Cuts n outputs into tasks, large ones first, so that threads take few and yet end together. Bounds of the tasks;
// inner ones are multiples of 16, so that no two tasks write into one cache line. All threads must cut alike, so
// `workers` is to be asked for outside of the parallel region: inside, at::get_num_threads differs between threads.
inline std::vector<int64_t> cut_outputs(int64_t n, int64_t bytes_each, int64_t workers) {
  constexpr int64_t kLeastBytes = 24 << 10;  // 2 us of one core's bandwidth
  const int64_t least = (std::max<int64_t>(1, kLeastBytes / std::max<int64_t>(1, bytes_each)) + 15) / 16 * 16;
  std::vector<int64_t> bounds{0};
  while (bounds.back() < n) {
    const int64_t left = n - bounds.back(), share = (left / (2 * workers) + 15) / 16 * 16;
    bounds.push_back(workers == 1 ? n : std::min(n, bounds.back() + std::max(least, share)));
  }
  return bounds;
}

}  // namespace icae_fast
