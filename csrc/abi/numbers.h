// Element types and integer helpers of both sides of the ABI.
#pragma once

#include <cstdint>

namespace icae_fast {

// A bfloat16 in memory. Arithmetic on it is in the units.
struct __attribute__((may_alias)) bf16 {
  uint16_t bits;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

enum class Dtype : int { Float = 0, BFloat16 = 1, Double = 2 };

}  // namespace icae_fast
