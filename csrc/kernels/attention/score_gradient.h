// P^T and dS^T of one query tile and some keys, for the backward.
#pragma once

#include "kernels/attention/backward_scratch.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/store.h"
#include "kernels/product.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

// One vector of lanes: weights from scores, and dS^T (without the scale) from both.
template <class T, bool masked>
struct LaneGradient {
  using P = Product<T>;
  using C = typename P::C;
  const BackwardScratch<T>& t;
  int64_t lane, key;  // first lane of the vector, first key of the tile
  C scale;
  const V<C> lse;
  const I<C> low, high;

  LaneGradient(const BackwardScratch<T>& t, int64_t lane, int64_t key, C scale)
      : t(t),
        lane(lane),
        key(key),
        scale(scale),
        lse(load(t.lse + lane)),
        low(load_int<C>(t.range->low + lane)),
        high(load_int<C>(t.range->high + lane)) {}

  ICAE_FORCED V<C> weight(int64_t k, V<C> score) const {
    // The maximum changes nothing but keeps the compiler from fusing product and difference: the logit must be
    // rounded as the forward rounded it into lse, or logits of 1e10 would be off by 64. It passes NaN.
    const V<C> logit = vmax(set1(-kLargest<C>), score * scale);
    // No weight exceeds 1. Rounding of large scores, which few.h sums in another order, may say so.
    const V<C> power = vmin(V<C>{}, (logit - lse) * C(1.4426950408889634));
    const V<C> p = exp2<C, Elem<T>::kExpDegree>(power);
    return masked ? (t.range->reads(key + k, low, high) ? p : V<C>{}) : p;
  }
  // Keys k and k + 1 of the tile.
  ICAE_FORCED void put_weights(int64_t k, V<C> p0, V<C> p1) const {
    store(t.p + k * t.kLaneDepth + lane, p0);
    store(t.p + (k + 1) * t.kLaneDepth + lane, p1);
  }
  ICAE_FORCED void put_gradients(int64_t k, V<C> ds0, V<C> ds1) const {
    store(t.ds + k * t.kLaneDepth + lane, ds0);
    store(t.ds + (k + 1) * t.kLaneDepth + lane, ds1);
    if constexpr (P::kPair == 2) store_steps<P, C>(t.ds_steps + k * kLanes + 2 * lane, ds0, ds1);
  }
};

// P^T and dS^T of n keys and all lanes, from S^T and dP^T in memory.
template <class T, bool masked>
static inline void differentiate_scores(const BackwardScratch<T>& t, int64_t vectors, int64_t key, int64_t n,
                                        typename Elem<T>::C c) {
  using C = typename Elem<T>::C;
  for (int64_t j = 0; j < vectors * Vec<C>::kWidth; j += Vec<C>::kWidth) {
    const LaneGradient<T, masked> lanes(t, j, key, c);
    const V<C> delta = load(t.delta + j);
    for (int64_t k = 0; k < n; k += 2) {
      const V<C> p0 = lanes.weight(k, load(t.s + k * kLanes + j));
      const V<C> p1 = lanes.weight(k + 1, load(t.s + (k + 1) * kLanes + j));
      const V<C> ds0 = p0 * (load(t.dp + k * kLanes + j) - delta);
      const V<C> ds1 = p1 * (load(t.dp + (k + 1) * kLanes + j) - delta);
      lanes.put_weights(k, p0, p1);
      lanes.put_gradients(k, ds0, ds1);
    }
  }
}

// P^T and dS^T of kBlockRows keys from the tile's key k on. S^T and dP^T are summed in registers and never stored.
// Only the weights are in memory meanwhile: 1.5 KiB.
template <class T, int vectors, bool masked>
static ICAE_FORCED void differentiate_block(const AttentionInput& in, const PackedKeys<T>& keys,
                                            const BackwardScratch<T>& t, int64_t lane, int64_t key, int64_t k,
                                            typename Elem<T>::C c) {
  using P = Product<T>;
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = keys.width(in), steps = ceil_div(in.head_dim, P::kPair);
  Block<P, vectors> x = {};
  multiply_into<P, vectors>(x, {keys.k_rows + (key + k) * width, width, P::kPair},
                            {t.q + lane * P::kPair, kLanes * P::kPair}, steps);
#pragma GCC unroll 4
  for (int n = 0; n < vectors; ++n) {
    const LaneGradient<T, masked> lanes(t, lane + n * W, key, c);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; m += 2) {
      const V<C> p0 = lanes.weight(k + m, x[m][n]), p1 = lanes.weight(k + m + 1, x[m + 1][n]);
      lanes.put_weights(k + m, p0, p1);
      store(t.weights + m * kLanes + lane + n * W, p0);
      store(t.weights + (m + 1) * kLanes + lane + n * W, p1);
    }
    const V<C> delta = load(t.delta + lane + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) x[m][n] = -delta;
  }
  multiply_into<P, vectors>(x, {keys.v_rows + (key + k) * width, width, P::kPair},
                            {t.dout + lane * P::kPair, kLanes * P::kPair}, steps);
#pragma GCC unroll 4
  for (int n = 0; n < vectors; ++n) {
    const LaneGradient<T, masked> lanes(t, lane + n * W, key, c);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; m += 2) {
      const V<C> p0 = load(t.weights + m * kLanes + lane + n * W);
      const V<C> p1 = load(t.weights + (m + 1) * kLanes + lane + n * W);
      lanes.put_gradients(k + m, p0 * x[m][n], p1 * x[m + 1][n]);
    }
  }
}

template <class T, bool masked>
static inline void differentiate_keys(const AttentionInput& in, const PackedKeys<T>& keys,
                                      const BackwardScratch<T>& t, int64_t vectors, int64_t key, int64_t n,
                                      typename Elem<T>::C c) {
  for_vector_blocks(vectors, [&](int64_t first, int64_t width) {
    const int64_t lane = first * Vec<typename Elem<T>::C>::kWidth;
    for (int64_t k = 0; k < n; k += kBlockRows) {
      if (width == 3) {
        differentiate_block<T, 3, masked>(in, keys, t, lane, key, k, c);
      } else if (width == 2) {
        differentiate_block<T, 2, masked>(in, keys, t, lane, key, k, c);
      } else {
        differentiate_block<T, 1, masked>(in, keys, t, lane, key, k, c);
      }
    }
  });
}

}  // namespace icae_fast::ICAE_UNIT
