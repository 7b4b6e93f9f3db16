// Vectors of the unit's width over GCC's vector extension, with intrinsics where the compiler's own choice is
// poor. Included inside a unit's namespace: ICAE_VECTOR_BYTES is the width, ICAE_AVX2 and ICAE_AVX512 say which
// intrinsics there are. Functions take and give vectors by value and are always inlined.

#define ICAE_FORCED inline __attribute__((always_inline))
#define ICAE_INLINE static ICAE_FORCED

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

// What a storage type is computed in, and how exact its exp has to be (the degree of the polynomial).
template <class T>
struct Elem {
  using C = T;
  static constexpr int kExpDegree = sizeof(T) == 8 ? 11 : 6;
};
template <>
struct Elem<bf16> {
  using C = float;
  static constexpr int kExpDegree = 4;  // 2.6e-6 of the value, where bf16 rounds at 2e-3
};

template <class C>
constexpr C kInfinity = C(__builtin_inf());

template <class C>
ICAE_INLINE V<C> set1(C x) {
  return x - V<C>{};
}
template <class C>
ICAE_INLINE I<C> set1_int(int64_t x) {
  return static_cast<typename Vec<C>::Int>(x) + I<C>{};
}

// The second argument wherever either is NaN, so that a NaN there is kept.
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
// 16 elements of bf16. GCC 12 makes five instructions of the conversion in `load`, through halves.
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
  const Vec<float>::U kept = v == v ? rounded : (u >> 16) | 0x40;  // rounding could carry a NaN into a number
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

ICAE_INLINE void assign(float* p, float x) { *p = x; }
ICAE_INLINE void assign(double* p, double x) { *p = x; }
ICAE_INLINE void assign(bf16* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x == x ? rounded : (u >> 16) | 0x40);
}

// The first n < width elements, the others 0.
template <class T>
ICAE_INLINE V<typename Elem<T>::C> load_n(const T* p, int64_t n) {
  using C = typename Elem<T>::C;
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
  for (int64_t i = 0; i < n; ++i) assign(p + i, buffer[i]);
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

// The sum of all elements.
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
    for (int i = 0; i < n; ++i) x[i] += x[i + n];  // a tree: one after the other would wait for each addition
  }
  return x[0];
#endif
}

#if defined(ICAE_AVX512)
// The sums of 16 vectors, each into one element.
ICAE_INLINE V<float> sum_each(V<float> (&x)[16]) {
  __m512i t[16];
  // Halves the number of vectors by adding neighbours, within and then across 128-bit parts.
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

ICAE_INLINE float log_of(float x) { return __builtin_logf(x); }
ICAE_INLINE double log_of(double x) { return __builtin_log(x); }
// Of positive numbers; NaN and infinity give NaN.
ICAE_INLINE V<float> log_of(V<float> x) {
  // x = 2^e m with m from sqrt(1/2) to sqrt(2), and log m = 2 artanh(s), whose next term is at most 7e-10.
  constexpr int32_t kRootOfHalf = 0x3F3504F3;
  const I<float> bits = (I<float>)x - kRootOfHalf;
  const V<float> e = __builtin_convertvector(bits >> 23, V<float>);
  const V<float> m = (V<float>)((bits & 0x7FFFFF) + kRootOfHalf);
  const V<float> s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const V<float> series = ((z * (1.0f / 9) + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3;
  return e * 0.693147181f + (2.0f * s + 2.0f * s * z * series) + (x - x);
}
ICAE_INLINE V<double> log_of(V<double> x) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) x[i] = log_of(x[i]);
  return x;
}

// ---- exp -----------------------------------------------------------------------------------------------------

// Minimax polynomials of 2^f on [-1/2, 1/2], lowest power first; largest relative error 2.6e-6, 1.9e-9, 3e-18.
constexpr double kExp4[] = {0.9999992614, 0.6931218147, 0.2402474482, 0.05591786031, 0.009570102015};
constexpr double kExp6[] = {
    1.0, 0.6931472057, 0.2402264689, 0.05550328777, 0.009618488957, 0.001339993121, 0.0001534581216};
constexpr double kExp11[] = {1.0,
                             0.69314718055994533046,
                             0.24022650695910156205,
                             0.055504108664819921483,
                             0.0096181291075883350833,
                             0.0013333558146789950323,
                             0.00015403530462514613026,
                             0.0000152527334899608046,
                             1.3215433089594629037e-6,
                             1.0178198033328527662e-7,
                             7.0741056262456593708e-9,
                             4.4352809446103361611e-10};

template <int degree>
constexpr const double* exp_coefficients() {
  return degree == 4 ? kExp4 : degree == 6 ? kExp6 : kExp11;
}

template <class C, int degree>
ICAE_INLINE V<C> exp2_polynomial(V<C> f) {
  constexpr const double* c = exp_coefficients<degree>();
  V<C> p = set1(C(c[degree]));
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = p * f + C(c[i]);
  return p;
}

// 2^t for t <= 127 or so; 0 for minus infinity; NaN stays. What is smaller than any normal number may be 0.
template <class C, int degree>
ICAE_INLINE V<C> exp2(V<C> t) {
#if defined(ICAE_AVX512)
  // 6.8 cycles a vector on Zen 4 where putting the exponent together from integers takes 8.2. At minus infinity the
  // polynomial is NaN, which scalef turns into 0, as it is specified to where the power is minus infinity.
  if constexpr (sizeof(C) == 4) {
    const V<C> n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_polynomial<C, degree>(t - n), n);
  } else {
    const V<C> n = _mm512_roundscale_pd(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_pd(exp2_polynomial<C, degree>(t - n), n);
  }
#else
  t = vmax(set1(C(-Vec<C>::kBias)), t);
  const V<C> shifted = t + Vec<C>::kRound;
  const V<C> p = exp2_polynomial<C, degree>(t - (shifted - Vec<C>::kRound));
  // The integer stands in the low bits of `shifted`; at -bias the exponent field becomes 0, and so the factor.
  const I<C> power = ((I<C>)shifted << Vec<C>::kMantissa) + ((I<C>{} + Vec<C>::kBias) << Vec<C>::kMantissa);
  return p * (V<C>)power;
#endif
}

// e^-x, the largest power of two for all x below that: 1 + it is as good as infinity in a sigmoid.
template <class C, int degree>
ICAE_INLINE V<C> exp_of_negative(V<C> x) {
  return exp2<C, degree>(vmin(set1(C(Vec<C>::kBias - 1)), x * C(-1.4426950408889634)));
}

// Calls `f(d, n)` for parts of n elements, of a vector's width but for the last.
template <int W, class F>
ICAE_INLINE void in_parts(int64_t size, F f) {
  int64_t d = 0;
  for (; d + W <= size; d += W) f(d, int64_t{W});
  if (d < size) f(d, size - d);
}

template <class T>
ICAE_INLINE V<typename Elem<T>::C> get(const T* p, int64_t n) {
  return n == Vec<typename Elem<T>::C>::kWidth ? load(p) : load_n(p, n);
}
template <class T>
ICAE_INLINE void put(T* p, V<typename Elem<T>::C> v, int64_t n) {
  n == Vec<typename Elem<T>::C>::kWidth ? store(p, v) : store_n(p, v, n);
}
