// Scratch of the backward, and the partial sums of its slices.
#pragma once

#include "kernels/attention/layout.h"
#include "kernels/attention/query_tile.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
struct BackwardScratch {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  // Lanes of a product that sums over lanes.
  static constexpr int64_t kLaneDepth = P::kTiles ? round_up(kLanes, kTileDepth) : kLanes;
  E *q, *dout;              // transposed, (steps, kLanes, pair)
  E *q_steps, *dout_steps;  // (kLaneDepth / pair, columns, pair)
  C *s, *dp;                // with tiles: (kKeys, kLanes)
  C* weights;               // without tiles: (kBlockRows, kLanes)
  E *p, *ds;                // row-major, (kKeys, kLaneDepth)
  E* ds_steps;              // (kKeys / pair, kLanes, pair); equal to ds if operands are not narrowed
  C* dq;                    // (width, kLanes)
  C *lse, *delta, *factor;  // (kLanes)
  KeyRange<C>* range;

  // Columns of dK and dV, whose head dimension lies along the vectors.
  static int64_t columns(const AttentionInput& in) { return round_up(in.head_dim, Vec<C>::kWidth); }

  BackwardScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    const int64_t transposed = PackedKeys<T>::width(in) * kLanes;
    q = arena.take<E>(transposed);
    dout = arena.take<E>(transposed);
    q_steps = arena.take<E>(kLaneDepth * columns(in));
    dout_steps = arena.take<E>(kLaneDepth * columns(in));
    s = arena.take<C>(P::kTiles ? kKeys * kLanes : 0);
    dp = arena.take<C>(P::kTiles ? kKeys * kLanes : 0);
    weights = arena.take<C>(P::kTiles ? 0 : kBlockRows * kLanes);
    p = arena.take<E>(kKeys * kLaneDepth);
    ds = arena.take<E>(kKeys * kLaneDepth);
    ds_steps = P::kPair == 1 ? ds : arena.take<E>(kKeys * kLanes);
    dq = arena.take<C>(PackedKeys<T>::width(in) * kLanes);
    lse = arena.take<C>(kLanes);
    delta = arena.take<C>(kLanes);
    factor = arena.take<C>(kLanes);
    range = arena.take<KeyRange<C>>(1);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

template <class T>
static int64_t backward_scratch_bytes(const AttentionInput& in) {
  int64_t bytes = 0;
  BackwardScratch<T>(in, Arena{nullptr}, &bytes);
  return bytes;
}

template <class T>
static int64_t partial_bytes(const AttentionInput& in, const AttentionGradient& g) {
  return 2 * in.kv_heads * g.partial_keys * BackwardScratch<T>::columns(in) * sizeof(typename Elem<T>::C);
}

// Where a slice's sum of dk begins. That of dv is `between` elements further.
template <class T>
struct PartialGradients {
  using C = typename Elem<T>::C;
  C* dk;
  int64_t between;
  PartialGradients(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t slice,
                   const AttentionGradient& g) {
    const int64_t columns = BackwardScratch<T>::columns(in);
    between = in.kv_heads * g.partial_keys * columns;
    dk = static_cast<C*>(g.partial) +
         (kv_head * g.partial_keys + row.partial_begin + slice * row.padded_keys()) * columns;
  }
};

}  // namespace icae_fast::ICAE_UNIT
