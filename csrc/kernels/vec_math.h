// Logarithm and exponential, scalar and vectorised.
#pragma once

#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

ICAE_INLINE float log_of(float x) { return __builtin_logf(x); }
ICAE_INLINE double log_of(double x) { return __builtin_log(x); }
// Logarithm of positive numbers. NaN and infinity return NaN.
ICAE_INLINE V<float> log_of(V<float> x) {
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)], and log m = 2 artanh(s), whose next term is at most 7e-10.
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

// Minimax polynomials of 2^f on [-1/2, 1/2], lowest power first. Largest relative errors: 2.6e-6, 1.9e-9, 3e-18.
constexpr double kExp2Degree4[] = {0.9999992614, 0.6931218147, 0.2402474482, 0.05591786031, 0.009570102015};
constexpr double kExp2Degree6[] = {
    1.0, 0.6931472057, 0.2402264689, 0.05550328777, 0.009618488957, 0.001339993121, 0.0001534581216};
constexpr double kExp2Degree11[] = {1.0,
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
constexpr const double* exp2_coefficients() {
  return degree == 4 ? kExp2Degree4 : degree == 6 ? kExp2Degree6 : kExp2Degree11;
}

template <class C, int degree>
ICAE_INLINE V<C> exp2_polynomial(V<C> f) {
  constexpr const double* c = exp2_coefficients<degree>();
  V<C> p = set1(C(c[degree]));
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = p * f + C(c[i]);
  return p;
}

// 2^t for t <= about 127. Minus infinity returns 0, and NaN returns NaN. In attention, subnormal results are 0
// (FlushSubnormals); elsewhere they may be.
template <class C, int degree>
ICAE_INLINE V<C> exp2(V<C> t) {
#if defined(ICAE_AVX512)
  // 6.8 cycles per vector on Zen 4, against 8.2 for building the exponent from integers. For minus infinity the
  // polynomial is NaN, and scalef returns 0, as specified for a power of minus infinity.
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
  // The integer is in the low bits of `shifted`. At -bias the exponent field becomes 0, and so does the factor.
  const I<C> power = ((I<C>)shifted << Vec<C>::kMantissa) + ((I<C>{} + Vec<C>::kBias) << Vec<C>::kMantissa);
  return p * (V<C>)power;
#endif
}

// e^-x, clamped to the largest power of two: for a sigmoid, 1 + that is as good as infinity.
template <class C, int degree>
ICAE_INLINE V<C> exp_of_negative(V<C> x) {
  return exp2<C, degree>(vmin(set1(C(Vec<C>::kBias - 1)), x * C(-1.4426950408889634)));
}

}  // namespace icae_fast::ICAE_UNIT
