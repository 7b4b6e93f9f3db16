// From scores to the softmax's weights, in registers.

// Weights 2^(c s) of scores relative to the shift, where they are as exact as T's arithmetic.
template <class T>
struct Weights {
  using C = typename Elem<T>::C;
  static constexpr bool kKeepsNan = true;
  const C exponent;

  explicit Weights(C c) : exponent(c) {}
  // The weights of two keys, stored as two rows of P^T and added to `total`.
  ICAE_FORCED void of_pair(V<C> even, V<C> odd, C* to, V<C>& total) const {
    const V<C> a = exp2<C, Elem<T>::kExpDegree>(even * exponent), b = exp2<C, Elem<T>::kExpDegree>(odd * exponent);
    store(to, a);
    store(to + kLanes, b);
    total += a + b;
  }
};

#if defined(ICAE_AVX512)
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

// Weights in bf16, made of integers: with t = c s rounded to 1/128, a bf16's bits are 128 (t + 127), but for the 7
// bits of its mantissa, which are looked up: round(128 (2^(i / 128) - 1)). Rounding t costs as much accuracy as
// rounding the weight does (RMS 0.16 % each), and the sum is that of the weights as they are used, so that
// rounding does not bias their mean. 2.5 instructions a weight, sum included; a polynomial, rounding and an fp32
// sum take 5.
template <>
struct Weights<bf16> {
  // The addition leaves the integer in the low bits. What is far below becomes kLowest, whose low bits are 0.
  static constexpr float kLowest = Vec<float>::kRound, kOne = kLowest + 127 * 128;
  static constexpr bool kKeepsNan = false;  // it becomes 0
  const float exponent;
  const __m512i low, high;  // the looked-up bits

  explicit Weights(float c)
      : exponent(c), low(_mm512_loadu_si512(kMantissas.bits)), high(_mm512_loadu_si512(kMantissas.bits + 64)) {}
  // Stored as a step of pairs, or widened as two rows.
  ICAE_FORCED void of_pair(V<float> even, V<float> odd, Product<bf16>::E* to, V<float>& total) const {
    const V<float> c = set1(exponent * 128), a = vmax(set1(kLowest), even * c + kOne),
                   b = vmax(set1(kLowest), odd * c + kOne);
    const __m512i words = _mm512_set_epi16(62, 30, 60, 28, 58, 26, 56, 24, 54, 22, 52, 20, 50, 18, 48, 16, 46, 14,
                                           44, 12, 42, 10, 40, 8, 38, 6, 36, 4, 34, 2, 32, 0);  // the low ones
    const __m512i t = _mm512_permutex2var_epi16((__m512i)a, words, (__m512i)b);
    const __m512i mantissa = _mm512_permutex2var_epi8(low, t, high);
    constexpr int kSelect = 0xCA;  // of the first two by the third
    const __m512i weights = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x7F), mantissa, t, kSelect);
    if constexpr (Product<bf16>::kPair == 2) {
      _mm512_storeu_si512(to, weights);
      total = _mm512_dpbf16_ps(total, (__m512bh)weights, (__m512bh)_mm512_set1_epi16(0x3F80));
    } else {
      const V<float> a = first_of_pairs(weights), b = second_of_pairs(weights);
      store(to, a);
      store(to + kLanes, b);
      total += a + b;
    }
  }
};
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
