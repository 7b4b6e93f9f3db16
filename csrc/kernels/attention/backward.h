// Gradient of attention for one slice: some of the query tiles of one (row, key/value head).
//
//     P^T = exp(scale S^T - lse),    dS^T = P^T (dP^T - delta),    dP^T = V dO^T,    delta = rowsum(dO O) - dlse
//     dV += P^T dO,    dK += scale dS^T Q,    dQ^T = scale K^T dS^T
//
// The outer loop is over query tiles, the inner one over keys. So a tile's dQ is complete after its keys. dK and dV
// accumulate in the slice's own fp32 matrices, which `sum_slices` adds in order. Hence there are no atomics, and
// results are deterministic.
#pragma once

#include "kernels/attention/backward_scratch.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/query_tile.h"
#include "kernels/attention/score_gradient.h"
#include "kernels/attention/store.h"
#include "kernels/flush.h"
#include "kernels/pack.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
static typename Elem<T>::C dot(const T* a, const T* b, int64_t n) {
  using C = typename Elem<T>::C;
  V<C> sums = {};
  for (int64_t i = 0; i < n; i += Vec<C>::kWidth) sums += load_at_most(a + i, n - i) * load_at_most(b + i, n - i);
  return sum<C>(sums);
}

// Pack a tile's Q and dO in both layouts, and compute what its lanes need of lse, out and dlse.
template <class T>
static void load_tile(const AttentionInput& in, const AttentionRow& row, const QueryTile& tile,
                      const BackwardScratch<T>& t, const AttentionGradient& g) {
  using P = Product<T>;
  using C = typename P::C;
  const int64_t lanes = tile.lanes(), dim = in.head_dim, columns = t.columns(in);
  const auto rows_of = [&](const Strided& x) {
    return [&](int64_t l) { return row_of<T>(x, row.q_begin + tile.position(l), tile.head(l)); };
  };
  pack_transposed<P, T>(rows_of(in.q), lanes, dim, in.scale < 0, t.q);
  pack_transposed<P, T>(rows_of(g.dout), lanes, dim, false, t.dout);
  pack_steps<P, T>(rows_of(in.q), lanes, dim, t.q_steps, columns, t.kLaneDepth);
  pack_steps<P, T>(rows_of(g.dout), lanes, dim, t.dout_steps, columns, t.kLaneDepth);
  if constexpr (P::kTiles) {
    clear_past<P>(t.q, dim, PackedKeys<T>::width(in));
    clear_past<P>(t.dout, dim, PackedKeys<T>::width(in));
    clear(t.p, kKeys * t.kLaneDepth);  // lanes that only pad the tile
    clear(t.ds, kKeys * t.kLaneDepth);
  }
  t.range->set(in, row, tile);
  for (int64_t l = 0; l < kLanes; ++l) {
    // Lanes that read no key or only pad the tile get weight 2^-inf = 0 everywhere.
    t.lse[l] = kInfinity<C>;
    t.delta[l] = 0;
    t.factor[l] = C(in.scale);
    if (l >= lanes || t.range->low[l] >= t.range->high[l]) continue;
    const int64_t query = row.q_begin + tile.position(l), at = tile.head(l) * in.n_queries + query;
    t.lse[l] = static_cast<const C*>(g.lse)[at];
    t.delta[l] = dot(rows_of(g.dout)(l), rows_of(g.out)(l), dim) - static_cast<const C*>(g.dlse)[at];
  }
}

// Zero keys [n, padded), which the products of dK, dV and dQ read.
template <class T>
static inline void clear_keys(const BackwardScratch<T>& t, int64_t n, int64_t padded) {
  clear(t.p + n * t.kLaneDepth, (padded - n) * t.kLaneDepth);
  clear(t.ds + n * t.kLaneDepth, (padded - n) * t.kLaneDepth);
  clear(t.ds_steps + n * kLanes, (padded - n) * kLanes);
}

// One (query tile, key tile) pair: n keys from `key` on. Their sums begin here if `result` is kOverwrite.
template <class T, Result result>
static void backward_keys(const AttentionInput& in, const PackedKeys<T>& keys, const BackwardScratch<T>& t,
                          int64_t lanes, int64_t key, int64_t n, const PartialGradients<T>& sums) {
  using P = Product<T>;
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = keys.width(in), columns = t.columns(in);
  const int64_t vectors = ceil_div(lanes, W);
  const int64_t lane_steps = (P::kTiles ? round_up(vectors * W, kTileDepth) : vectors * W) / P::kPair;
  const int64_t padded = P::kTiles ? round_up(n, kTileDepth) : n;
  const C c = score_scale<C>(in.scale);
  const bool cut = t.range->cut(key, key + n);
  if constexpr (P::kTiles) {
    const int64_t steps = width / P::kPair;
    multiply<P, Result::kOverwrite>({keys.k_rows + key * width, width, P::kPair}, padded, {t.q, kLanes * P::kPair},
                                    vectors, steps, t.s, kLanes);
    multiply<P, Result::kOverwrite>({keys.v_rows + key * width, width, P::kPair}, padded,
                                    {t.dout, kLanes * P::kPair}, vectors, steps, t.dp, kLanes);
    cut ? differentiate_scores<T, true>(t, vectors, key, n, c)
        : differentiate_scores<T, false>(t, vectors, key, n, c);
    clear_keys(t, n, padded);
  } else {
    cut ? differentiate_keys<T, true>(in, keys, t, vectors, key, n, c)
        : differentiate_keys<T, false>(in, keys, t, vectors, key, n, c);
  }
  multiply<P, result>({t.ds, t.kLaneDepth, P::kPair}, padded, {t.q_steps, columns * P::kPair}, columns / W,
                      lane_steps, sums.dk + key * columns, columns);
  multiply<P, result>({t.p, t.kLaneDepth, P::kPair}, padded, {t.dout_steps, columns * P::kPair}, columns / W,
                      lane_steps, sums.dk + sums.between + key * columns, columns);
  multiply<P, Result::kAccumulate>(keys.columns(in, keys.k_steps, key), width, {t.ds_steps, kLanes * P::kPair},
                                   vectors, padded / P::kPair, t.dq, kLanes);
}

template <class T>
static void backward_slice(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t slice,
                           const void* packed, void* scratch, const AttentionGradient& g) {
  const FlushSubnormals flush;
  const PackedKeys<T> keys(in, row, kv_head, true, packed);
  const BackwardScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const PartialGradients<T> sums(in, row, kv_head, slice, g);
  const TileRegisters<Product<T>> use;
  const auto clear_sums = [&](int64_t first, int64_t last) {
    clear(sums.dk + first * t.columns(in), (last - first) * t.columns(in));
    clear(sums.dk + sums.between + first * t.columns(in), (last - first) * t.columns(in));
  };
  // Run the last tile first. It reads the most keys and initialises their sums. Each earlier tile initialises only
  // sums of keys before those. Clearing all sums beforehand took 5 % of the time at 640 tokens.
  int64_t begun = row.padded_keys();
  for (int64_t i = slice + (row.n_tiles(in) - 1 - slice) / row.n_slices * row.n_slices; i >= 0; i -= row.n_slices) {
    const QueryTile tile(in, row, kv_head, i);
    load_tile<T>(in, row, tile, t, g);
    clear(t.dq, keys.width(in) * kLanes);
    const int64_t end = round_up(t.range->end, kPad);
    for (int64_t key = t.range->template first<Product<T>>(), next; key < t.range->end; key = next) {
      next = at_most((key / kKeys + 1) * kKeys, end);
      if (key < begun) {
        next = at_most(next, begun);
        backward_keys<T, Result::kOverwrite>(in, keys, t, tile.lanes(), key, next - key, sums);
      } else {
        backward_keys<T, Result::kAccumulate>(in, keys, t, tile.lanes(), key, next - key, sums);
      }
    }
    clear_sums(at_most(end, begun), begun);
    begun = at_most(begun, t.range->template first<Product<T>>());
    store_transposed<T>(t.dq, t.factor, tile.lanes(), in.head_dim, [&](int64_t l) {
      const int64_t query = row.q_begin + tile.position(l);
      return static_cast<T*>(g.dq) + (query * in.q_heads + tile.head(l)) * in.head_dim;
    });
  }
  clear_sums(0, begun);
}

// Reduce the slices' sums and write dk and dv of the row's keys [first, last) for one key/value head.
template <class T>
static void sum_slices(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t first,
                       int64_t last, const AttentionGradient& g) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t columns = BackwardScratch<T>::columns(in), next = row.padded_keys() * columns;
  const FlushSubnormals flush;
  const PartialGradients<T> sums(in, row, kv_head, 0, g);
  const auto write = [&](const C* from, T* to, C scale) {
    for (int64_t d = 0; d < in.head_dim; d += W) {
      V<C> total = {};
      for (int64_t slice = 0; slice < row.n_slices; ++slice) total += load(from + slice * next + d);
      const int64_t left = in.head_dim - d;
      left >= W ? store(to + d, total * scale) : store_n(to + d, total * scale, left);
    }
  };
  for (int64_t key = first; key < at_most(last, row.n_keys); ++key) {
    const int64_t to = ((row.k_begin + key) * in.kv_heads + kv_head) * in.head_dim;
    write(sums.dk + key * columns, static_cast<T*>(g.dk) + to, C(in.scale));
    write(sums.dk + sums.between + key * columns, static_cast<T*>(g.dv) + to, C(1));
  }
}

}  // namespace icae_fast::ICAE_UNIT
