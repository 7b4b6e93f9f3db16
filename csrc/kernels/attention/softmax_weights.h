// Softmax weights from scores, in registers.
#pragma once

#include "kernels/attention/half_values.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

// Weights 2^(c s) of scores s relative to the shift, as exact as T's arithmetic.
template <class T>
struct SoftmaxWeights {
  using C = typename Elem<T>::C;
  static constexpr bool kKeepsNan = true;
  const C exponent;

  explicit SoftmaxWeights(C c) : exponent(c) {}
  // `Sum` accumulates a block's weights. `begin` starts it from the total, `end` returns the new total.
  using Sum = V<C>;
  ICAE_FORCED Sum begin(V<C> total) const { return total; }
  ICAE_FORCED V<C> end(Sum sum, V<C>) const { return sum; }
  // Compute the weights of two keys, store them as two rows of P^T, and add them to `sum`.
  ICAE_FORCED void of_pair(V<C> even, V<C> odd, C* to, Sum& sum) const {
    const V<C> a = exp2<C, Elem<T>::kExpDegree>(even * exponent), b = exp2<C, Elem<T>::kExpDegree>(odd * exponent);
    store(to, a);
    store(to + kLanes, b);
    sum += a + b;
  }
};

// Multiply the weights of `keys` keys and one vector of lanes by powers of two <= 1.
template <class C>
static inline void scale_weights(C* p, int64_t keys, V<C> factor) {
  for (int64_t k = 0; k < keys; ++k) store(p + k * kLanes, load(p + k * kLanes) * factor);
}

#if defined(ICAE_AVX512)
constexpr int kSelect = 0xCA;  // select bits of the second or third operand by the first

// Scale packed 16-bit floats with `mantissa` mantissa bits by a power of two <= 1 by lowering their exponents.
// Underflow saturates near 0.
ICAE_INLINE void scale_pairs_down(void* p, int64_t keys, V<float> factor, int mantissa) {
  __m512i powers = _mm512_sub_epi32(_mm512_set1_epi32(127), _mm512_srli_epi32((__m512i)factor, 23));
  powers = _mm512_sll_epi32(_mm512_max_epi32(powers, _mm512_setzero_si512()), _mm_cvtsi32_si128(mantissa));
  powers = _mm512_min_epi32(powers, _mm512_set1_epi32(0x7FFF));
  powers = _mm512_or_si512(powers, _mm512_slli_epi32(powers, 16));
  for (int64_t k = 0; k < keys; k += 2) {
    char* const pairs = static_cast<char*>(p) + k * kLanes * 2;
    _mm512_storeu_si512(pairs, _mm512_subs_epu16(_mm512_loadu_si512(pairs), powers));
  }
}
ICAE_INLINE void scale_weights(bf16* p, int64_t keys, V<float> factor) { scale_pairs_down(p, keys, factor, 7); }
#if defined(ICAE_FP16)
ICAE_INLINE void scale_weights(half* p, int64_t keys, V<float> factor) { scale_pairs_down(p, keys, factor, 10); }
#endif

#if !defined(ICAE_FP16)
struct Mantissas {
  uint8_t bits[128];
  constexpr Mantissas() : bits{} {
    double power = 1;
    for (uint8_t& b : bits) {
      b = static_cast<uint8_t>(128 * (power - 1) + 0.5);
      power *= 1.0054299011128028;  // 2^(1/128)
    }
  }
};
constexpr Mantissas kMantissas;

// Weights in bf16, computed with integers. With t = c s rounded to 1/128, the bits of a bf16 are 128 (t + 127),
// except for the 7 bits of the mantissa. A table holds those: round(128 (2^(i / 128) - 1)). Rounding t costs as
// much accuracy as rounding the weight (RMS 0.16 % each). The sum is that of the rounded weights, so rounding does
// not bias their mean. This takes 2.5 instructions per weight, sum included; a polynomial, rounding and an fp32 sum
// take 5.
template <>
struct SoftmaxWeights<bf16> {
  // Adding kOne leaves the integer in the low bits. Very small weights become kLowest, whose low bits are 0.
  static constexpr float kLowest = Vec<float>::kRound, kOne = kLowest + 127 * 128;
  static constexpr bool kKeepsNan = false;  // NaN becomes 0
  const float exponent;
  const __m512i low, high;  // the table of mantissas

  explicit SoftmaxWeights(float c)
      : exponent(c), low(_mm512_loadu_si512(kMantissas.bits)), high(_mm512_loadu_si512(kMantissas.bits + 64)) {}
  using Sum = V<float>;
  ICAE_FORCED Sum begin(V<float> total) const { return total; }
  ICAE_FORCED V<float> end(Sum sum, V<float>) const { return sum; }
  // Stored as one step of pairs.
  ICAE_FORCED void of_pair(V<float> even, V<float> odd, bf16* to, Sum& sum) const {
    const V<float> c = set1(exponent * 128), a = vmax(set1(kLowest), even * c + kOne),
                   b = vmax(set1(kLowest), odd * c + kOne);
    const __m512i words = _mm512_set_epi16(62, 30, 60, 28, 58, 26, 56, 24, 54, 22, 52, 20, 50, 18, 48, 16, 46, 14,
                                           44, 12, 42, 10, 40, 8, 38, 6, 36, 4, 34, 2, 32, 0);  // the low words
    const __m512i t = _mm512_permutex2var_epi16((__m512i)a, words, (__m512i)b);
    const __m512i mantissa = _mm512_permutex2var_epi8(low, t, high);
    const __m512i weights = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x7F), mantissa, t, kSelect);
    _mm512_storeu_si512(to, weights);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi16(0x3F80));
  }
};
#else
// Weights in fp16, times 2^kHalfOne. With t = c s rounded to 1/1024, the bits 1024 (t + 15) are those of 2^floor(t)
// (1 + f), but 2^floor(t) 2^f is needed. So they are multiplied by a cubic in 1 + f that approximates 2^f / (1 + f)
// within 0.06 % (RMS, including its rounding to fp16; at most 0.19 %). A block's weights are summed in fp16, which
// rounds 8 of them three times. The permutations that look up bf16's mantissas take three micro-operations each on
// Intel's cores. The cubic is as fast there, and three times as exact.
template <>
struct SoftmaxWeights<bf16> {
  static constexpr float kLowest = Vec<float>::kRound, kOne = kLowest + (15 + kHalfOne) * 1024;
  static constexpr bool kKeepsNan = false;
  const float exponent;

  explicit SoftmaxWeights(float c) : exponent(c) {}
  using Sum = __m512h;
  ICAE_FORCED Sum begin(V<float>) const { return _mm512_setzero_ph(); }
  ICAE_FORCED V<float> end(Sum sum, V<float> total) const {
    return total + sum_of_pairs(sum) * (1.0f / (1 << kHalfOne));
  }
  ICAE_FORCED void of_pair(V<float> even, V<float> odd, half* to, Sum& sum) const {
    const V<float> c = set1(exponent * 1024), a = vmax(set1(kLowest), even * c + kOne),
                   b = vmax(set1(kLowest), odd * c + kOne);
    const __m512i t = _mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)a, _mm512_slli_epi32((__m512i)b, 16));
    const __m512h u =
        (__m512h)_mm512_ternarylogic_epi32(_mm512_set1_epi16(0x3FF), t, _mm512_set1_epi16(0x3C00), kSelect);
    const auto cubic = [](float x) { return _mm512_set1_ph(static_cast<_Float16>(x)); };
    __m512h factor = _mm512_fmadd_ph(cubic(-0.10308837890625f), u, cubic(0.69189453125f));
    factor = _mm512_fmadd_ph(factor, u, cubic(-1.353515625f));
    factor = _mm512_fmadd_ph(factor, u, cubic(1.763671875f));
    const __m512h weights = _mm512_mul_ph((__m512h)t, factor);
    _mm512_storeu_si512(to, (__m512i)weights);
    sum = _mm512_add_ph(sum, weights);
  }
};
#endif
#endif

ICAE_INLINE bool all_finite(const void*, int64_t) { return true; }
#if defined(ICAE_AVX512)
ICAE_INLINE bool all_finite(const bf16* x, int64_t n) {  // n is a multiple of 32
  const __m512i exponent = _mm512_set1_epi16(0x7F80);
  __mmask32 found = 0;
  for (int64_t i = 0; i < n; i += 32) {
    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(x + i), exponent), exponent);
  }
  return found == 0;
}
ICAE_INLINE bool all_finite(const float* x, int64_t n) {  // n is a multiple of 16
  const __m512i exponent = _mm512_set1_epi32(0x7F800000);
  __mmask16 found = 0;
  for (int64_t i = 0; i < n; i += 16) {
    found |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_loadu_si512(x + i), exponent), exponent);
  }
  return found == 0;
}
#endif

}  // namespace icae_fast::ICAE_UNIT
