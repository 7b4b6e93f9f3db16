// `Phases` under ThreadSanitizer, which GNU OpenMP is not built for: threads of the standard library run the
// phases.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/phases.h"

namespace {

constexpr int64_t kTasks = 23;

// Every phase reads what all tasks of the one before wrote, without any other synchronisation. Return the wrong
// sums.
int64_t wrong_sums(int64_t threads, int64_t phases, int64_t slow_every) {
  icae_fast::Phases shared(phases);
  std::vector<std::vector<int64_t>> written(phases, std::vector<int64_t>(kTasks, -1));
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([&] {
      icae_fast::Phases::Worker worker(shared);
      for (int64_t p = 0; p < phases; ++p) {
        const auto task = [&](int64_t i) {
          int64_t sum = 0;
          for (int64_t j = 0; p > 0 && j < kTasks; ++j) sum += written[p - 1][j];
          if (p > 0 && sum != kTasks * (p - 1)) ++wrong;
          // The others pass their spins, and sleep.
          if (slow_every > 0 && p % slow_every == 0 && i == 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
          }
          written[p][i] = p;
        };
        worker.run(kTasks, [](int64_t) {}, task, [](int64_t) { return false; });
      }
    });
  }
  for (auto& thread : pool) thread.join();
  return wrong;
}

// A task of the middle phase throws while the others sleep. Return how many threads did not throw.
int64_t silent_threads(int64_t threads) {
  constexpr int64_t kPhases = 9;
  icae_fast::Phases shared(kPhases);
  std::atomic<int64_t> thrown{0};
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([&] {
      icae_fast::Phases::Worker worker(shared);
      try {
        for (int64_t p = 0; p < kPhases; ++p) {
          const auto task = [&](int64_t i) {
            if (p != kPhases / 2 || i != 0) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            throw std::runtime_error("a task fails");
          };
          worker.run(kTasks, [](int64_t) {}, task, [](int64_t) { return false; });
        }
      } catch (const std::runtime_error&) {
        ++thrown;
      }
    });
  }
  for (auto& thread : pool) thread.join();
  return threads - thrown;
}

}  // namespace

int main() {
  int64_t wrong = 0, silent = 0;
  for (const int64_t threads : {1, 2, 3, 8}) {
    wrong += wrong_sums(threads, 400, 0) + wrong_sums(threads, 20, 5);
    silent += silent_threads(threads);
  }
  std::printf("%lld wrong sums, %lld silent threads\n", static_cast<long long>(wrong),
              static_cast<long long>(silent));
  return wrong + silent > 0;
}
