// Work that goes on phase after phase on one set of threads: a token step has some two hundred phases of 30 us or
// so, and opening a parallel region for each would cost as much as a tenth of it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
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

    // Runs f(task) for the tasks of the next phase that this thread takes; `before(task)` first, if it takes any.
    // Then, until all are done, `idle(task)` again and again with the task of the phase after this one that this
    // thread will begin with (there may be none of that number); it says whether there was something to do. What
    // the phase wrote is seen by all who return from it, and where a task raises all of them do.
    template <class Before, class F, class Idle>
    void run(int64_t tasks, const Before& before, const F& f, Idle idle) {
      auto &now = phases_.phases_[phase_++], &then = phases_.phases_[phase_];
      int64_t task = first_ < 0 ? now.next++ : first_, mine = 0;
      try {
        if (task < tasks) before(task);
        for (; task < tasks; task = now.next++, ++mine) f(task);
      } catch (...) {
        phases_.fail(std::current_exception());
        throw;
      }
      if (mine > 0) now.done.fetch_add(mine, std::memory_order_acq_rel);
      first_ = then.next++;
      for (int64_t spins = 0; now.done.load(std::memory_order_acquire) < tasks; ++spins) {
        if (phases_.failed_.load(std::memory_order_acquire)) std::rethrow_exception(phases_.error_);
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

  // Others must not wait for what will never be done.
  void fail(std::exception_ptr error) {
    if (failing_.test_and_set()) return;
    error_ = std::move(error);
    failed_.store(true, std::memory_order_release);
  }

  static void pause(int64_t spins) {
    constexpr int64_t kSpins = 1 << 12;  // some 100 us; then this thread may be in the way of the one it waits for
    if (spins > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  std::vector<Phase> phases_;
  std::atomic_flag failing_ = ATOMIC_FLAG_INIT;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// Cuts n outputs into tasks: a long one for each worker, and the last sixteenth in short ones for whoever comes
// first. Each task is a new stream of weights, which the hardware's prefetching has to find first: with tasks that
// grow shorter from a quarter on, threads ended together too, but SmolLM2's matrices took 10 % longer at 55 GB/s.
// Bounds of the tasks; inner ones are multiples of 16, so that no two tasks write into one cache line. All threads
// must cut alike, so `workers` is to be asked for outside of the parallel region: inside, at::get_num_threads
// differs between threads.
inline std::vector<int64_t> cut_outputs(int64_t n, int64_t bytes_each, int64_t workers) {
  constexpr int64_t kLeastBytes = 24 << 10;  // 2 us of one core's bandwidth
  if (workers == 1) return n > 0 ? std::vector<int64_t>{0, n} : std::vector<int64_t>{0};
  const auto in_lines = [](int64_t outputs) { return (outputs + 15) / 16 * 16; };
  const int64_t longest = n * 15 / 16 / workers / 16 * 16;
  const int64_t least = in_lines(std::max<int64_t>(1, kLeastBytes / std::max<int64_t>(1, bytes_each)));
  std::vector<int64_t> bounds{0};
  for (int64_t w = 0; w < workers && longest >= least; ++w) bounds.push_back(bounds.back() + longest);
  const int64_t step = std::max(least, in_lines((n - bounds.back()) / (2 * workers)));
  while (bounds.back() < n) bounds.push_back(std::min(n, bounds.back() + step));
  return bounds;
}

}  // namespace icae_fast
