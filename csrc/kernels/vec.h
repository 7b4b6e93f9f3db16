// Vectors of the unit's width on GCC's vector extension, with intrinsics where the compiler's code is poor.
// Functions pass vectors by value and are always inlined.
#pragma once

#include "kernels/unit.h"

namespace icae_fast::ICAE_UNIT {

template <class C>
struct Vec;

template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(ICAE_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(ICAE_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(ICAE_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(ICAE_VECTOR_BYTES / 2)));
  typedef int32_t Int;
  static constexpr int kWidth = ICAE_VECTOR_BYTES / 4;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
};

template <>
struct Vec<double> {
  typedef double V __attribute__((vector_size(ICAE_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(ICAE_VECTOR_BYTES)));
  typedef int64_t Int;
  static constexpr int kWidth = ICAE_VECTOR_BYTES / 8;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
};

template <class C>
using V = typename Vec<C>::V;
template <class C>
using I = typename Vec<C>::I;

// The compute type of a storage type, and the degree of the polynomial that makes exp exact enough for it.
template <class T>
struct Elem {
  using C = T;
  static constexpr int kExpDegree = sizeof(T) == 8 ? 11 : 6;
};
template <>
struct Elem<bf16> {
  using C = float;
  static constexpr int kExpDegree = 4;  // relative error 2.6e-6; bf16 rounds at 2e-3
};

template <class C>
constexpr C kInfinity = C(__builtin_inf());
template <class C>
constexpr C kLargest = sizeof(C) == 8 ? C(__DBL_MAX__) : C(__FLT_MAX__);

template <class C>
ICAE_INLINE V<C> set1(C x) {
  return x - V<C>{};
}
template <class C>
ICAE_INLINE I<C> set1_int(int64_t x) {
  return static_cast<typename Vec<C>::Int>(x) + I<C>{};
}

// Maximum and minimum. If either operand is NaN, the result is the second one, so that a NaN there is kept.
ICAE_INLINE V<float> vmax(V<float> a, V<float> b) {
#if defined(ICAE_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(ICAE_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
ICAE_INLINE V<double> vmax(V<double> a, V<double> b) {
#if defined(ICAE_AVX512)
  return _mm512_max_pd(a, b);
#elif defined(ICAE_AVX2)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

ICAE_INLINE V<float> vmin(V<float> a, V<float> b) {
#if defined(ICAE_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(ICAE_AVX2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
ICAE_INLINE V<double> vmin(V<double> a, V<double> b) {
#if defined(ICAE_AVX512)
  return _mm512_min_pd(a, b);
#elif defined(ICAE_AVX2)
  return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// ---- memory --------------------------------------------------------------------------------------------------

template <class C>
ICAE_INLINE V<C> load(const C* p) {
  V<C> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
ICAE_INLINE void store(C* p, V<C> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class C>
ICAE_INLINE I<C> load_int(const typename Vec<C>::Int* p) {
  I<C> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

#if defined(ICAE_AVX512)
// 16 elements of bf16. For `load`, GCC 12 generates five instructions, through halves.
ICAE_INLINE V<float> widen(__m256i x) { return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
#endif
ICAE_INLINE V<float> load(const bf16* p) {
#if defined(ICAE_AVX512)
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  Vec<float>::Half half;
  __builtin_memcpy(&half, p, sizeof half);
  return (V<float>)(__builtin_convertvector(half, Vec<float>::U) << 16);
#endif
}
ICAE_INLINE void store(bf16* p, V<float> v) {
#if defined(ICAE_AVX512)
  const __m256bh half = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &half, sizeof half);
#else
  const Vec<float>::U u = (Vec<float>::U)v;
  const Vec<float>::U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Vec<float>::U kept = v == v ? rounded : (u >> 16) | 0x40;  // rounding could turn a NaN into a number
  const Vec<float>::Half half = __builtin_convertvector(kept, Vec<float>::Half);
  __builtin_memcpy(p, &half, sizeof half);
#endif
}

ICAE_INLINE float to_compute(bf16 x) {
  const uint32_t u = uint32_t{x.bits} << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}
ICAE_INLINE float to_compute(float x) { return x; }
ICAE_INLINE double to_compute(double x) { return x; }

ICAE_INLINE void store_one(float* p, float x) { *p = x; }
ICAE_INLINE void store_one(double* p, double x) { *p = x; }
ICAE_INLINE void store_one(bf16* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x == x ? rounded : (u >> 16) | 0x40);
}

// Load or store the first n elements, n < width. Other loaded elements are 0.
template <class T>
ICAE_INLINE V<typename Elem<T>::C> load_n(const T* p, int64_t n) {
#if defined(ICAE_AVX512)
  const __mmask16 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    return widen(_mm256_maskz_loadu_epi16(mask, p));
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    return _mm512_maskz_loadu_pd(mask, p);
  }
#else
  using C = typename Elem<T>::C;
  C buffer[Vec<C>::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_compute(p[i]);
  return load(buffer);
#endif
}
template <class T>
ICAE_INLINE void store_n(T* p, V<typename Elem<T>::C> v, int64_t n) {
#if defined(ICAE_AVX512)
  const __mmask16 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, v);
  } else {
    _mm512_mask_storeu_pd(p, mask, v);
  }
#else
  using C = typename Elem<T>::C;
  C buffer[Vec<C>::kWidth];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) store_one(p + i, buffer[i]);
#endif
}

// Whether any element of a comparison's result is set.
template <class C>
ICAE_INLINE bool any(I<C> v) {
#if defined(ICAE_AVX512)
  return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(ICAE_AVX2)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  bool found = false;
  for (int i = 0; i < Vec<C>::kWidth; ++i) found |= v[i] != 0;
  return found;
#endif
}

// Sum of all elements.
template <class C>
ICAE_INLINE C sum(V<C> v) {
#if defined(ICAE_AVX512)
  if constexpr (sizeof(C) == 4) {
    return _mm512_reduce_add_ps(v);
  } else {
    return _mm512_reduce_add_pd(v);
  }
#else
  C x[Vec<C>::kWidth];
  store(x, v);
  for (int n = Vec<C>::kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i)
      x[i] += x[i + n];  // a tree: in sequence, each addition would wait for the previous one
  }
  return x[0];
#endif
}

#if defined(ICAE_AVX512)
// The sums of 16 vectors, as the elements of one vector.
ICAE_INLINE V<float> sum_each(V<float> (&x)[16]) {
  __m512i t[16];
  // Add neighbouring vectors, which halves their number: within 128-bit parts first, then across them.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = x[2 * i], b = x[2 * i + 1];
    x[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)x[2 * i], b = (__m512d)x[2 * i + 1];
    t[i] = (__m512i)((V<float>)_mm512_unpacklo_pd(a, b) + (V<float>)_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i a = t[2 * i], b = t[2 * i + 1];
    x[i] = (V<float>)_mm512_shuffle_i32x4(a, b, 0x88) + (V<float>)_mm512_shuffle_i32x4(a, b, 0xdd);
  }
  return (V<float>)_mm512_shuffle_f32x4(x[0], x[1], 0x88) + (V<float>)_mm512_shuffle_f32x4(x[0], x[1], 0xdd);
}
#endif

// Call f(d, n) for n elements from d on, a vector at a time. Only the last call may have n < W.
template <int W, class F>
ICAE_INLINE void for_vectors(int64_t size, F f) {
  int64_t d = 0;
  for (; d + W <= size; d += W) f(d, int64_t{W});
  if (d < size) f(d, size - d);
}

// Load or store n elements, n <= width. Loaded elements past n are 0.
template <class T>
ICAE_INLINE V<typename Elem<T>::C> load_up_to(const T* p, int64_t n) {
  return n == Vec<typename Elem<T>::C>::kWidth ? load(p) : load_n(p, n);
}
template <class T>
ICAE_INLINE void store_up_to(T* p, V<typename Elem<T>::C> v, int64_t n) {
  n == Vec<typename Elem<T>::C>::kWidth ? store(p, v) : store_n(p, v, n);
}
// Load a whole vector, or the last elements if fewer are left.
template <class T>
ICAE_INLINE V<typename Elem<T>::C> load_at_most(const T* p, int64_t left) {
  return left >= Vec<typename Elem<T>::C>::kWidth ? load(p) : load_n(p, left);
}

}  // namespace icae_fast::ICAE_UNIT
