#include "common/isa.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "common/tiles.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace icae_fast {
namespace {

// amx_in_torch: torch was built with oneDNN's AMX kernels, and no ONEDNN_MAX_CPU_ISA forbids them.
const std::vector<std::string> kTileFeatures{"amx_tile", "amx_bf16", "amx_in_torch"};

struct Unit {
  const char* name;
  const Kernels& (*table)();
  std::vector<std::string> needs;
};

std::vector<Unit> units() {
  std::vector<Unit> all{{"scalar", kernels_scalar, {}}};
#if defined(__x86_64__)
  all.push_back({"avx2", kernels_avx2, {"avx2", "fma"}});
  std::vector<std::string> needs{"avx2",     "fma",      "avx512f",     "avx512bw",
                                 "avx512vl", "avx512dq", "avx512_vbmi", "avx512_bf16"};
#if defined(ICAE_BUILDS_FP16)
  auto with_fp16 = needs;
  with_fp16.emplace_back("avx512_fp16");
  all.push_back({"avx512_fp16", kernels_avx512_fp16, with_fp16});
#endif
  all.push_back({"avx512", kernels_avx512, needs});
  needs.insert(needs.end(), kTileFeatures.begin(), kTileFeatures.end());
  all.push_back({"amx", kernels_amx, needs});
#endif
  return all;
}

#if defined(__x86_64__)
// Register states that the OS saves and restores. Using any other register faults.
uint64_t enabled_states() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 27))) return 0;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux grants the AMX tile registers to a process only on request (kernel 5.16 and later).
bool tiles_permitted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<std::string> detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  std::vector<std::string> found;
  const auto add = [&found](bool has, const char* name) {
    if (has) found.emplace_back(name);
  };
  const uint64_t states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6, zmm = ymm && (states & 0xe0) == 0xe0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = c & (1u << 12);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned last_subleaf = a, amx = d;
  const bool fp16 = d & (1u << 23);
  const bool vbmi = c & (1u << 1);
  add(ymm && (b & (1u << 5)), "avx2");
  add(ymm && fma, "fma");
  add(zmm && (b & (1u << 16)), "avx512f");
  add(zmm && (b & (1u << 30)), "avx512bw");
  add(zmm && (b & (1u << 31)), "avx512vl");
  add(zmm && (b & (1u << 17)), "avx512dq");
  add(zmm && vbmi, "avx512_vbmi");
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) add(zmm && (a & (1u << 5)), "avx512_bf16");
  add(zmm && fp16, "avx512_fp16");
  if ((amx & (1u << 24)) && (states & 0x60000) == 0x60000 && tiles_permitted()) {
    add(true, "amx_tile");
    add(amx & (1u << 22), "amx_bf16");
    add(amx & (1u << 25), "amx_int8");
    add((amx & (1u << 22)) && has_tiles(), "amx_in_torch");
  }
  return found;
}
#elif defined(__aarch64__)
std::vector<std::string> detect() { return {"neon"}; }
#else
std::vector<std::string> detect() { return {}; }
#endif

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// For tests only: brgemm also runs without AMX, slowly, and so does the unit if it is forced.
bool emulates_tiles() {
  const char* variable = std::getenv("ICAE_FAST_TEST_AMX");
  return variable != nullptr && std::string(variable) == "1";
}

// Features that `unit` needs and that are neither this CPU's nor in `also`.
std::vector<std::string> missing(const Unit& unit, const std::vector<std::string>& also = {}) {
  auto have = cpu_features();
  have.insert(have.end(), also.begin(), also.end());
  std::vector<std::string> lacking;
  for (const auto& need : unit.needs) {
    if (std::find(have.begin(), have.end(), need) == have.end()) lacking.push_back(need);
  }
  return lacking;
}

#if defined(__x86_64__)
double product_time(const Kernels& unit) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto products = static_cast<double>(unit.bf16_products());
  return std::chrono::duration<double>(Clock::now() - begin).count() / products;
}

// Return the faster of the two units for AVX512-BF16. `vdpbf16ps` multiplies twice as fast as FMAs on Zen 4, and
// half as fast on Xeons that leave bf16 to AMX (Emerald Rapids). Neither the CPU's features nor its name tell, so
// this measures both in a tenth of a millisecond. It takes the best of many tries, because other processes cannot
// disturb all of those.
const Kernels& faster_bf16_unit() {
  const Kernels* widening = nullptr;  // null unless this build has the unit and the CPU can run it
  for (const auto& unit : units()) {
    if (std::string(unit.name) == "avx512_fp16" && missing(unit).empty()) widening = &unit.table();
  }
  if (widening == nullptr) return kernels_avx512();
  constexpr int kTries = 16;
  double pairs = std::numeric_limits<double>::infinity(), fma = pairs;
  for (int i = 0; i < kTries; ++i) {
    pairs = std::min(pairs, product_time(kernels_avx512()));
    fma = std::min(fma, product_time(*widening));
  }
  return fma < pairs ? *widening : kernels_avx512();
}
#endif

const Kernels* select() {
  const char* variable = std::getenv("ICAE_FAST_ISA");
  const std::string forced = variable == nullptr ? "" : variable;
  const Kernels* best = nullptr;
  for (const auto& unit : units()) {
    const auto lacking = forced == unit.name && emulates_tiles() ? missing(unit, kTileFeatures) : missing(unit);
    if (forced == unit.name && !lacking.empty()) {
      throw std::runtime_error("ICAE_FAST_ISA=" + forced + ", but this CPU lacks " + join(lacking) +
                               "; unset it to choose the best instruction set");
    }
    if (lacking.empty() && (forced.empty() || forced == unit.name)) best = &unit.table();
  }
  if (best == nullptr) {
    throw std::runtime_error("ICAE_FAST_ISA is '" + forced + "'; this build knows " + join(built_isas()) +
                             "; unset it to choose the best one that this CPU has");
  }
#if defined(__x86_64__)
  if (forced.empty() && best == &kernels_avx512()) best = &faster_bf16_unit();
#endif
  return best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const selected = select();
#if defined(__x86_64__)
  static const Kernels* const without_tiles = selected == &kernels_amx() ? &faster_bf16_unit() : selected;
  if (selected != without_tiles && !tiles_enabled()) return *without_tiles;
#endif
  return *selected;
}

std::vector<std::string> cpu_features() {
  static const std::vector<std::string> found = detect();
  return found;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const auto& unit : units()) names.emplace_back(unit.name);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const auto& unit : units()) {
    if (missing(unit).empty()) names.emplace_back(unit.name);
  }
  return names;
}

}  // namespace icae_fast
