// Passes of a token step over single rows and heads.
#pragma once

#include "kernels/rows/inverse_rms.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
static void widen_row(const void* from, int64_t n, void* to) {
  for (int64_t i = 0; i < n; ++i)
    static_cast<typename Elem<T>::C*>(to)[i] = to_compute(static_cast<const T*>(from)[i]);
}

// y = x / rms(x) * weight, from the compute type to T.
template <class T>
static void norm_row(const void* from, const void* weight, double eps, int64_t n, void* to) {
  using C = typename Elem<T>::C;
  const C* x = static_cast<const C*>(from);
  const C inverse = inverse_rms(x, n, eps);
  for_vectors<Vec<C>::kWidth>(n, [&](int64_t i, int64_t part) {
    store_up_to(static_cast<T*>(to) + i,
                load_up_to(x + i, part) * inverse * load_up_to(static_cast<const T*>(weight) + i, part), part);
  });
}

// One projected head: RMS norm unless `weight` is null, then RoPE unless `cos` is null.
template <class T>
static void norm_rope_head(const void* from, const void* weight, double eps, const void* cos, const void* sin,
                           int64_t dim, void* to) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const C* y = static_cast<const C*>(from);
  T* out = static_cast<T*>(to);
  const T* scale = static_cast<const T*>(weight);
  if (cos == nullptr)
    return for_vectors<W>(dim, [&](int64_t d, int64_t n) { store_up_to(out + d, load_up_to(y + d, n), n); });
  const C inverse = scale == nullptr ? C(1) : inverse_rms(y, dim, eps);
  const int64_t half = dim / 2;
  for_vectors<W>(half, [&](int64_t d, int64_t n) {
    V<C> a = load_up_to(y + d, n), b = load_up_to(y + half + d, n);
    if (scale != nullptr) {
      a = a * inverse * load_up_to(scale + d, n);
      b = b * inverse * load_up_to(scale + half + d, n);
    }
    const V<C> c = load_up_to(static_cast<const C*>(cos) + d, n), s = load_up_to(static_cast<const C*>(sin) + d, n);
    store_up_to(out + d, a * c - b * s, n);
    store_up_to(out + half + d, b * c + a * s, n);
  });
}

// Merge `n` partial outputs of one head over different keys, each normalised, by their log-sum-exps: sum_i e^(lse_i
// - lse) out_i,  lse = log sum_i e^lse_i.
template <class T>
static void merge_head(const void* const* outs, const void* const* lses, int64_t n, int64_t dim, void* to) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  C highest = -kInfinity<C>, total = 0;
  const auto lse = [&](int64_t i) { return *static_cast<const C*>(lses[i]); };
  for (int64_t i = 0; i < n; ++i) highest = lse(i) > highest ? lse(i) : highest;
  const auto weight = [&](int64_t i) {
    return lse(i) == -kInfinity<C>
               ? C(0)
               : exp2<C, Elem<C>::kExpDegree>(set1((lse(i) - highest) * C(1.4426950408889634)))[0];
  };
  for (int64_t i = 0; i < n; ++i) total += weight(i);
  const C inverse = total == 0 ? C(0) : 1 / total;
  for_vectors<W>(dim, [&](int64_t d, int64_t part) {
    V<C> sums = {};
    for (int64_t i = 0; i < n; ++i)
      sums += load_up_to(static_cast<const C*>(outs[i]) + d, part) * (weight(i) * inverse);
    store_up_to(static_cast<T*>(to) + d, sums, part);
  });
}

// Index of the first maximum, or of the first NaN, in two passes of plain maxima and comparisons. Torch's maximum
// with indices took 0.1 ms for a token's 49,152 logits (Zen 4).
template <class T>
static int64_t argmax_first(const void* values, int64_t n) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth, kChains = 4;  // a maximum takes four cycles
  const C* x = static_cast<const C*>(values);
  V<C> most[kChains];
  for (auto& m : most) m = set1(-kInfinity<C>);
  I<C> nan = {};
  int64_t i = 0;
  for (; i + kChains * W <= n; i += kChains * W) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const V<C> v = load(x + i + c * W);
      most[c] = vmax(most[c], v);
      nan |= v != v;
    }
  }
  C highest = -kInfinity<C>;
  bool any_nan = any<C>(nan);
  for (const auto& m : most) {
    for (int l = 0; l < W; ++l) highest = m[l] > highest ? m[l] : highest;
  }
  for (; i < n; ++i) {
    any_nan |= x[i] != x[i];
    highest = x[i] > highest ? x[i] : highest;
  }
  const V<C> wanted = set1(highest);
  for (i = 0; i + W <= n; i += W) {
    const V<C> v = load(x + i);
    if (any<C>(any_nan ? v != v : v == wanted)) break;
  }
  while (i < n && !(any_nan ? x[i] != x[i] : x[i] == highest)) ++i;
  return i;
}

}  // namespace icae_fast::ICAE_UNIT
