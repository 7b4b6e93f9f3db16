// Consecutive phases of work on one set of threads. A token step has about two hundred phases of about 30 us;
// opening a parallel region for each would cost up to a tenth of that.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace icae_fast {

// Threads take tasks of a phase until none is left, and continue when all are done, whichever thread ran them. So
// neither the number of threads nor their arrival matters: a single thread runs everything, and a thread that
// arrives late finds the first phases done. Each thread has its own `Worker`.
class Phases {
 public:
  explicit Phases(int64_t n) : phases_(n + 1) {}

  class Worker {
   public:
    explicit Worker(Phases& phases) : phases_(phases) {}

    // Run f(task) for each task of the next phase that this thread takes; `before(task)` runs first if it takes
    // any. While waiting for the others, call `idle(task)` repeatedly with this thread's first task of the
    // following phase (that phase may have fewer tasks). `idle` returns whether it found work. Everything that the
    // phase wrote is visible when this returns. If a task throws, every thread throws.
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
      if (mine > 0) now.finish(mine, tasks);
      first_ = then.next++;
      for (int64_t spins = 0, done; (done = now.done.load(std::memory_order_acquire)) < tasks; ++spins) {
        if (!idle(first_)) now.pause(spins, done);
      }
      if (phases_.failed_.load(std::memory_order_acquire)) std::rethrow_exception(phases_.error_);
    }

   private:
    Phases& phases_;
    int64_t phase_ = 0, first_ = -1;
  };

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};

    // Count `mine` more tasks as done, and wake threads that sleep if those were the last.
    void finish(int64_t mine, int64_t tasks) {
      if (done.fetch_add(mine) + mine >= tasks) done.notify_all();
    }

    // Wait a little, or, after about 100 us, sleep until `done` changes: whoever waits longer may occupy the CPU
    // that the last task needs.
    void pause(int64_t spins, int64_t seen) {
      constexpr int64_t kSpins = 1 << 12;
      if (spins > kSpins) return done.wait(seen, std::memory_order_acquire);
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  };

  // Stop the other threads from waiting for tasks that will never finish.
  void fail(std::exception_ptr error) {
    if (failing_.test_and_set()) return;
    error_ = std::move(error);
    failed_.store(true, std::memory_order_release);
    for (auto& phase : phases_) phase.finish(kFailed, 0);
  }

  static constexpr int64_t kFailed = int64_t{1} << 62;  // more than any number of tasks

  std::vector<Phase> phases_;
  std::atomic_flag failing_ = ATOMIC_FLAG_INIT;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// Cut n outputs into tasks: one long task per worker, and the last sixteenth in short ones that any worker may
// take. Each task starts a new stream of weights, which the hardware prefetcher must detect first. Tasks that
// shrink from a quarter on also let threads end together, but SmolLM2's matrices took 10 % longer at 55 GB/s.
//
// Returns the tasks' bounds. Inner bounds are multiples of 16, so that no two tasks write to one cache line. All
// threads must cut alike, so call running_threads for `workers` outside of the parallel region: inside, it
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
