// Scratch of the forward, and the prefetch of its next query tile.
#pragma once

#include "kernels/attention/half_values.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/query_tile.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

constexpr int64_t kPrefetchLanes = 2;  // prefetched with every block of keys
// P^T in bf16 takes 12 KiB of the first-level cache, and O^T another 12 at head_dim 64. AMX needs larger products,
// and CPUs with AMX have 2 MiB of second-level cache.
#if defined(ICAE_AMX)
constexpr int64_t kForwardKeys = kColumnTile;
#else
constexpr int64_t kForwardKeys = 128;
#endif

// Per lane: the shift, the largest score that does not raise it (minus infinity while there is no shift yet), and
// the sum of weights.
template <class C>
struct Softmax {
  C shift[kLanes], limit[kLanes], sum[kLanes];
};

// Addresses of a tile's rows of q and of the output.
template <class T>
struct TileRows {
  const AttentionInput& in;
  const AttentionRow& row;
  const AttentionOutput& to;
  const QueryTile& tile;

  const T* q(int64_t lane) const { return row_of<T>(in.q, row.q_begin + tile.position(lane), tile.head(lane)); }
  template <class O>
  O* out(int64_t lane) const {
    const int64_t query = row.q_begin + tile.position(lane) - to.first;
    return static_cast<O*>(to.out) + (query * in.q_heads + tile.head(lane)) * in.head_dim;
  }
};

// Prefetches rows of q and of the output of the next tile into the second-level cache. They are too far apart for
// the hardware prefetcher, and waiting for one miss after the other took a tenth of the time at 4 x 640 tokens
// (AVX-512). A few lanes are prefetched at a time, between products: all at once waited for one another.
template <class T>
struct TilePrefetch {
  const char *q[kLanes], *out[kLanes];
  int64_t lanes = 0, next = 0, q_bytes = 0, out_bytes = 0;

  void plan(const AttentionInput& in, const NextTile& next_tile, const AttentionOutput& to) {
    lanes = next = 0;
    if (next_tile.row == nullptr) return;
    const QueryTile tile(in, *next_tile.row, next_tile.kv_head, next_tile.tile);
    const TileRows<T> rows{in, *next_tile.row, to, tile};
    lanes = tile.lanes();
    q_bytes = in.head_dim * sizeof(T);
    out_bytes = in.head_dim * (to.partial ? sizeof(typename Elem<T>::C) : sizeof(T));
    for (int64_t l = 0; l < lanes; ++l) {
      q[l] = reinterpret_cast<const char*>(rows.q(l));
      out[l] = to.partial ? reinterpret_cast<const char*>(rows.template out<typename Elem<T>::C>(l))
                          : reinterpret_cast<const char*>(rows.template out<T>(l));
    }
  }
  ICAE_FORCED void issue(int64_t n) {
    for (const int64_t end = at_most(lanes, next + n); next < end; ++next) {
      for (int64_t byte = 0; byte < q_bytes; byte += 64) __builtin_prefetch(q[next] + byte, 0, 2);
      for (int64_t byte = 0; byte < out_bytes; byte += 64) __builtin_prefetch(out[next] + byte, 1, 2);
    }
  }
};

template <class T>
struct ForwardScratch {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  E* q;                            // (steps, kLanes, pair)
  typename ValueProduct<T>::E* p;  // (kForwardKeys / pair, kLanes, pair)
  C* o;                            // (width, kLanes)
  C* s;                            // with tiles: (kForwardKeys, kLanes)
  Softmax<C>* softmax;
  KeyRange<C>* range;
  TilePrefetch<T>* prefetch;

  ForwardScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    q = arena.take<E>(PackedKeys<T>::width(in) * kLanes);
    p = arena.take<typename ValueProduct<T>::E>(kForwardKeys * kLanes);
    o = arena.take<C>(PackedKeys<T>::width(in) * kLanes);
    s = arena.take<C>(P::kTiles ? kForwardKeys * kLanes : 0);
    softmax = arena.take<Softmax<C>>(1);
    range = arena.take<KeyRange<C>>(1);
    prefetch = arena.take<TilePrefetch<T>>(1);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

}  // namespace icae_fast::ICAE_UNIT
