// Attention of at most kFewLanes lanes (decoding). Keys are read once, in place, without packing. Scores are dot
// products along the head.
//
// With T = bf16 and `vdpbf16ps`, even a slow one, q and the weights stay bf16: at three lanes of 64, a key then
// takes a quarter of the cycles.
#pragma once

#include "kernels/attention/few_products.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/query_tile.h"
#include "kernels/attention/store.h"
#include "kernels/flush.h"
#include "kernels/pack.h"
#include "kernels/product.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

// Prefetch n keys or values. They are used once and so are never cached. Without the prefetch, 8192 of SmolLM2's
// keys came at 14 GB/s and not at 18; with interleaved heads, at 12 and not at 19 (Zen 4, two threads).
template <class T>
static inline void prefetch_keys(const T* x, int64_t row, int64_t n, int64_t dim) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(x + i * row + d, 0, 2);
  }
}

// Call one of the functions for each group of 4, 2 or 1 lanes. Each has its number of lanes as a template argument.
template <class F4, class F2, class F1>
ICAE_INLINE void for_lane_groups(int64_t lanes, F4 four, F2 two, F1 one) {
  int64_t l = 0;
  for (; l + 4 <= lanes; l += 4) four(l);
  for (; l + 2 <= lanes; l += 2) two(l);
  for (; l < lanes; ++l) one(l);
}

template <class T>
static inline void few_scores(const AttentionInput& in, const T* k, int64_t n, const FewScratch<T>& t,
                              int64_t lanes) {
#if defined(ICAE_AVX512)
  if constexpr (kFewPairs<T>) return few_pair_scores(in, k, n, t, lanes);
#endif
  for_lane_groups(
      lanes, [&](int64_t l) { few_wide_scores<T, 4>(in, k, n, t, l); },
      [&](int64_t l) { few_wide_scores<T, 2>(in, k, n, t, l); },
      [&](int64_t l) { few_wide_scores<T, 1>(in, k, n, t, l); });
}

template <class T>
static inline void few_values(const AttentionInput& in, const T* v, int64_t n, const FewScratch<T>& t,
                              int64_t lanes, const typename Elem<T>::C* factor) {
#if defined(ICAE_AVX512)
  if constexpr (kFewPairs<T>) {
    for (int64_t l = 0; l < lanes; ++l) {
      const float* s = t.s + l * kKeys;
      for (int64_t key = 0; key < round_up(n, 16); key += 16) store(t.narrow_s + l * kKeys + key, load(s + key));
    }
    return for_lane_groups(
        lanes, [&](int64_t l) { few_pair_values<4>(in, v, n, t, l, factor); },
        [&](int64_t l) { few_pair_values<2>(in, v, n, t, l, factor); },
        [&](int64_t l) { few_pair_values<1>(in, v, n, t, l, factor); });
  }
#endif
  for_lane_groups(
      lanes, [&](int64_t l) { few_wide_values<T, 4>(in, v, n, t, l, factor); },
      [&](int64_t l) { few_wide_values<T, 2>(in, v, n, t, l, factor); },
      [&](int64_t l) { few_wide_values<T, 1>(in, v, n, t, l, factor); });
}

// Turn a lane's n scores into weights. Returns the factor that rescales earlier sums.
template <class T>
static inline typename Elem<T>::C few_weights(typename Elem<T>::C* s, int64_t n, typename Elem<T>::C c,
                                              typename Elem<T>::C* max, typename Elem<T>::C* sum_of) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth, degree = Elem<T>::kExpDegree;
  for (int64_t k = n; k < round_up(n, W); ++k) s[k] = -kInfinity<C>;
  V<C> top = set1(*max);
  for (int64_t k = 0; k < n; k += W) top = vmax(top, load(s + k));
  C highest = top[0];
  for (int i = 1; i < W; ++i) highest = top[i] > highest ? top[i] : highest;
  // Subtracted before the product, which the compiler would fuse: c times the highest score, less its rounded
  // value, is 2^6 at logits of 1e10.
  const C shift = highest == -kInfinity<C> ? C(0) : highest;
  V<C> total = {};
  for (int64_t k = 0; k < n; k += W) {
    const V<C> weights = exp2<C, degree>((load(s + k) - shift) * c);
    total += weights;
    store(s + k, weights);
  }
  const C factor = exp2<C, degree>(set1((*max - shift) * c))[0];
  *max = highest;
  *sum_of = *sum_of * factor + sum<C>(total);
  return factor;
}

template <class T>
static void forward_few(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, void* scratch,
                        const AttentionOutput& to) {
  using C = typename Elem<T>::C;
  const FlushSubnormals flush;
  const QueryTile tile(in, row, kv_head, 0);
  const FewScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const int64_t lanes = tile.lanes(), width = t.width(in), dim = in.head_dim;
  KeyRange<C> range;
  range.set(in, row, tile, lanes);
  C max[kFewLanes], total[kFewLanes] = {}, factor[kFewLanes];
  prefetch_keys(row_of<T>(in.k, row.k_begin + range.begin, kv_head), in.k.row,
                at_most(kKeys, range.end - range.begin), dim);
  clear(t.o, kFewLanes * width);
  kFewPairs<T> ? clear(t.narrow_q, kFewLanes * width) : clear(t.q, kFewLanes * width);
  for (int64_t l = 0; l < lanes; ++l) {
    const T* q = row_of<T>(in.q, row.q_begin + tile.position(l), tile.head(l));
    for_vectors<Vec<C>::kWidth>(dim, [&](int64_t d, int64_t n) {
      const V<C> value = in.scale < 0 ? -load_up_to(q + d, n) : load_up_to(q + d, n);
      kFewPairs<T> ? store_up_to(t.narrow_q + l * width + d, value, n) : store_up_to(t.q + l * width + d, value, n);
    });
    max[l] = -kInfinity<C>;
  }
  const C c = C(exponent_scale(in.scale));
  for (int64_t key = range.begin; key < range.end; key += kKeys) {
    const int64_t n = at_most(kKeys, range.end - key);
    const T* k = row_of<T>(in.k, row.k_begin + key, kv_head);
    const T* v = row_of<T>(in.v, row.k_begin + key, kv_head);
    // Values arrive while scores are computed, and the next keys while values are summed.
    prefetch_keys(v, in.v.row, n, dim);
    few_scores(in, k, n, t, lanes);
    prefetch_keys(k + n * in.k.row, in.k.row, at_most(kKeys, range.end - key - n), dim);
    for (int64_t l = 0; l < lanes; ++l) {
      C* s = t.s + l * kKeys;
      for (int64_t i = 0; i < n && key + i < range.low[l]; ++i) s[i] = -kInfinity<C>;
      for (int64_t i = at_least(0, range.high[l] - key); i < n; ++i) s[i] = -kInfinity<C>;
      factor[l] = few_weights<T>(s, n, c, max + l, total + l);
    }
    few_values(in, v, n, t, lanes, factor);
  }
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t query = row.q_begin + tile.position(l) - to.first;
    static_cast<C*>(to.lse)[tile.head(l) * to.n + query] =
        total[l] == 0 ? -kInfinity<C>
                      : C(double(max[l] * score_scale<C>(in.scale)) + __builtin_log(double(total[l])));
    const C inverse = total[l] == 0 ? C(0) : 1 / total[l];
    const int64_t at = (query * in.q_heads + tile.head(l)) * dim;
    for_vectors<Vec<C>::kWidth>(dim, [&](int64_t d, int64_t n) {
      const V<C> o = load_up_to(t.o + l * width + d, n) * inverse;
      to.partial ? store_up_to(static_cast<C*>(to.out) + at + d, o, n)
                 : store_up_to(static_cast<T*>(to.out) + at + d, o, n);
    });
  }
}

}  // namespace icae_fast::ICAE_UNIT
