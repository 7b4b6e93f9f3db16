// Stores of transposed tiles, and the softmax's exponent.
#pragma once

#include "kernels/product.h"
#include "kernels/shuffle.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

// Narrow two keys' weights and store them as one step.
#if defined(ICAE_AVX512)
ICAE_INLINE __m512i pair_up(V<float> even, V<float> odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}
#endif
template <class P, class C, class E>
ICAE_INLINE void store_steps(E* to, V<C> even, V<C> odd) {
  if constexpr (P::kPair == 1) {
    store(to, even);
    store(to + kLanes, odd);
  } else {
#if defined(ICAE_AVX512)
    _mm512_storeu_si512(to, pair_up(even, odd));
#endif
  }
}

// Weights are 2^(score * exponent) with exponent |scale| log2(e). Q carries the sign of a negative scale. A scale
// of 0 would turn a masked -inf into NaN; a tiny one gives the same weights.
static inline double exponent_scale(double scale) {
  const double size = scale < 0 ? -scale : scale;
  return (size < 1e-30 ? 1e-30 : size) * 1.4426950408889634;
}

// Logits are scores times this. Forward and backward use the same rounded value, so that a logit of 1e10 is the
// same number in both.
template <class C>
static inline C score_scale(double scale) {
  return C(exponent_scale(scale) * 0.6931471805599453);
}

#if defined(ICAE_AVX512)
// Load 16 lanes of up to 16 rows of x[dim][kLanes], times `factor`, as 16 rows.
ICAE_INLINE void load_transposed(const float* x, V<float> factor, int64_t n, __m512i (&block)[16]) {
  for (int i = 0; i < 16; ++i) {
    block[i] = i < n ? (__m512i)(load(x + i * kLanes) * factor) : _mm512_setzero_si512();
  }
  transpose(block);
}

// Store whole lines of 32 elements: a line that is written in halves stalls twice.
template <class Row>
static inline void store_transposed_lines(const float* x, const float* factor, int64_t lanes, int64_t dim,
                                          Row row) {
  for (int64_t l = 0; l < lanes; l += 16) {
    const V<float> f = load(factor + l);
    const int64_t n = at_most(16, lanes - l);
    bf16* to[16];
    for (int64_t i = 0; i < n; ++i) to[i] = row(l + i);
    for (int64_t d = 0; d < dim; d += 32) {
      __m512i low[16], high[16];
      load_transposed(x + d * kLanes + l, f, 16, low);
      load_transposed(x + (d + 16) * kLanes + l, f, 16, high);
      for (int64_t i = 0; i < n; ++i) {
        _mm512_storeu_si512(to[i] + d, (__m512i)_mm512_cvtne2ps_pbh((__m512)high[i], (__m512)low[i]));
      }
    }
  }
}
#endif

// Store a transposed tile x[dim][kLanes], times each lane's `factor`, to `row(lane)`.
template <class T, class Row>
static inline void store_transposed(const typename Elem<T>::C* x, const typename Elem<T>::C* factor, int64_t lanes,
                                    int64_t dim, Row row) {
#if defined(ICAE_AVX512)
  if constexpr (sizeof(typename Elem<T>::C) == 4) {
    if constexpr (sizeof(T) == 2) {
      if (dim % 32 == 0) return store_transposed_lines(x, factor, lanes, dim, row);
    }
    for (int64_t l = 0; l < lanes; l += 16) {
      const V<float> f = load(factor + l);
      for (int64_t d = 0; d < dim; d += 16) {
        __m512i block[16];
        const int64_t n = at_most(16, dim - d);
        load_transposed(x + d * kLanes + l, f, n, block);
        for (int i = 0; i < 16 && l + i < lanes; ++i) {
          T* to = row(l + i) + d;
          n == 16 ? store(to, (V<float>)block[i]) : store_n(to, (V<float>)block[i], n);
        }
      }
    }
    return;
  }
#endif
  for (int64_t l = 0; l < lanes; ++l) {
    T* to = row(l);
    for (int64_t d = 0; d < dim; ++d) store_one(to + d, x[d * kLanes + l] * factor[l]);
  }
}

}  // namespace icae_fast::ICAE_UNIT
