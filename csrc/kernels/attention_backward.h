// Gradient of attention for one slice: some of the query tiles of one (row, key/value head).
//
//     P^T = 2^(c S^T - c lse),    dS^T = P^T (dP^T - delta),    dP^T = V dO^T,    delta = rowsum(dO O) - dlse
//     dV += P^T dO,    dK += scale dS^T Q,    dQ^T = scale K^T dS^T
//
// Tiles run outside and keys inside: dQ of a tile is finished when its keys are, and dK and dV are summed up in the
// slice's own fp32 matrices, which `sum_slices` adds in order. Hence no atomics, and the same result every time.

template <class T>
struct BackwardScratch {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  // Lanes of a product that sums over them.
  static constexpr int64_t kLaneDepth = P::kTiles ? round_up(kLanes, kTileDepth) : kLanes;
  E *q, *dout;              // transposed, (steps, kLanes, pair)
  E *q_steps, *dout_steps;  // (kLaneDepth / pair, columns, pair)
  C *s, *dp;                // (kKeys, kLanes)
  E *p, *ds;                // by rows, (kKeys, kLaneDepth): s and dp themselves where operands are not narrowed
  E* ds_steps;              // (kKeys / pair, kLanes, pair): ds itself in that case
  C* dq;                    // (width, kLanes)
  C *lse, *delta, *factor;  // (kLanes)
  KeyRange<C>* range;

  // Columns of dK and dV, where the head runs along the vectors.
  static int64_t columns(const AttentionInput& in) { return round_up(in.head_dim, Vec<C>::kWidth); }

  BackwardScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    const int64_t transposed = PackedKeys<T>::width(in) * kLanes;
    q = arena.take<E>(transposed);
    dout = arena.take<E>(transposed);
    q_steps = arena.take<E>(kLaneDepth * columns(in));
    dout_steps = arena.take<E>(kLaneDepth * columns(in));
    s = arena.take<C>(kKeys * kLanes);
    dp = arena.take<C>(kKeys * kLanes);
    if constexpr (P::kPair == 1) {
      p = s;
      ds = ds_steps = dp;
    } else {
      p = arena.take<E>(kKeys * kLaneDepth);
      ds = arena.take<E>(kKeys * kLaneDepth);
      ds_steps = arena.take<E>(kKeys * kLanes);
    }
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

// Where a slice's sum of dk begins; that of dv lies `between` elements on.
template <class T>
struct Partial {
  using C = typename Elem<T>::C;
  C* dk;
  int64_t between;
  Partial(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t slice,
          const AttentionGradient& g) {
    const int64_t columns = BackwardScratch<T>::columns(in);
    between = in.kv_heads * g.partial_keys * columns;
    dk = static_cast<C*>(g.partial) +
         (kv_head * g.partial_keys + row.partial_begin + slice * row.padded_keys()) * columns;
  }
};

template <class T>
static typename Elem<T>::C dot(const T* a, const T* b, int64_t n) {
  using C = typename Elem<T>::C;
  V<C> sums = {};
  for (int64_t i = 0; i < n; i += Vec<C>::kWidth) sums += load_part(a + i, n - i) * load_part(b + i, n - i);
  return sum<C>(sums);
}

// Packs a tile's Q and dO in both layouts, and what its lanes need of lse, out and dlse.
template <class T>
static void load_tile(const AttentionInput& in, const AttentionRow& row, const Tile& tile,
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
    clear(t.p, kKeys * t.kLaneDepth);  // of lanes that only fill up a tile
    clear(t.ds, kKeys * t.kLaneDepth);
  }
  t.range->set(in, row, tile);
  for (int64_t l = 0; l < kLanes; ++l) {
    // Lanes that read no key, or only pad the tile, get the weight 2^-inf = 0 everywhere.
    t.lse[l] = kInfinity<C>;
    t.delta[l] = 0;
    t.factor[l] = C(in.scale);
    if (l >= lanes || t.range->low[l] >= t.range->high[l]) continue;
    const int64_t query = row.q_begin + tile.position(l), at = tile.head(l) * in.n_queries + query;
    t.lse[l] = C(static_cast<const C*>(g.lse)[at] * 1.4426950408889634);
    t.delta[l] = dot(rows_of(g.dout)(l), rows_of(g.out)(l), dim) - static_cast<const C*>(g.dlse)[at];
  }
}

// P^T over S^T and dS^T over dP^T (in dS without the scale) for the lanes from j on.
template <class T, bool masked>
static inline void differentiate_lanes(const BackwardScratch<T>& t, int64_t j, int64_t n, int64_t key,
                                       typename Elem<T>::C c) {
  using P = Product<T>;
  using C = typename P::C;
  const I<C> low = load_int<C>(t.range->low + j), high = load_int<C>(t.range->high + j);
  const V<C> lse = load(t.lse + j), delta = load(t.delta + j);
  const auto weigh = [&](int64_t k) {
    const V<C> p = exp2<C, Elem<T>::kExpDegree>(load(t.s + k * kLanes + j) * c - lse);
    return masked ? (t.range->reads(key + k, low, high) ? p : V<C>{}) : p;
  };
  for (int64_t k = 0; k < n; k += 2) {
    const V<C> p0 = weigh(k), p1 = weigh(k + 1);
    const V<C> ds0 = p0 * (load(t.dp + k * kLanes + j) - delta);
    const V<C> ds1 = p1 * (load(t.dp + (k + 1) * kLanes + j) - delta);
    store(t.p + k * t.kLaneDepth + j, p0);
    store(t.p + (k + 1) * t.kLaneDepth + j, p1);
    store(t.ds + k * t.kLaneDepth + j, ds0);
    store(t.ds + (k + 1) * t.kLaneDepth + j, ds1);
    if constexpr (P::kPair == 2) store_steps<P, C>(t.ds_steps + k * kLanes + 2 * j, ds0, ds1);
  }
}

// Makes what the products of dK, dV and dQ read of keys from n up to `padded` zero.
template <class T>
static inline void clear_keys(const BackwardScratch<T>& t, int64_t n, int64_t padded) {
  clear(t.p + n * t.kLaneDepth, (padded - n) * t.kLaneDepth);
  clear(t.ds + n * t.kLaneDepth, (padded - n) * t.kLaneDepth);
  clear(t.ds_steps + n * kLanes, (padded - n) * kLanes);
}

// One (query tile, key tile) pair: `key` is the first of n keys.
template <class T>
static void backward_keys(const AttentionInput& in, const PackedKeys<T>& keys, const BackwardScratch<T>& t,
                          int64_t lanes, int64_t key, int64_t n, const Partial<T>& sums) {
  using P = Product<T>;
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = keys.width(in), columns = t.columns(in);
  const int64_t steps = P::kTiles ? width / P::kPair : ceil_div(in.head_dim, P::kPair);
  const int64_t vectors = ceil_div(lanes, W);
  const int64_t lane_steps = (P::kTiles ? round_up(vectors * W, kTileDepth) : vectors * W) / P::kPair;
  const int64_t padded = P::kTiles ? round_up(n, kTileDepth) : n;
  multiply<P, Into::kSet>({keys.k_rows + key * width, width, P::kPair}, padded, {t.q, kLanes * P::kPair}, vectors,
                          steps, t.s, kLanes);
  multiply<P, Into::kSet>({keys.v_rows + key * width, width, P::kPair}, padded, {t.dout, kLanes * P::kPair},
                          vectors, steps, t.dp, kLanes);
  const C c = C(exponent_scale(in.scale));
  for (int64_t j = 0; j < vectors * W; j += W) {
    t.range->cut(key, key + n) ? differentiate_lanes<T, true>(t, j, n, key, c)
                               : differentiate_lanes<T, false>(t, j, n, key, c);
  }
  if constexpr (P::kTiles) clear_keys(t, n, padded);
  multiply<P, Into::kAdd>({t.ds, t.kLaneDepth, P::kPair}, padded, {t.q_steps, columns * P::kPair}, columns / W,
                          lane_steps, sums.dk + key * columns, columns);
  multiply<P, Into::kAdd>({t.p, t.kLaneDepth, P::kPair}, padded, {t.dout_steps, columns * P::kPair}, columns / W,
                          lane_steps, sums.dk + sums.between + key * columns, columns);
  multiply<P, Into::kAdd>(keys.columns(in, keys.k_steps, key), width, {t.ds_steps, kLanes * P::kPair}, vectors,
                          padded / P::kPair, t.dq, kLanes);
}

template <class T>
static void backward_slice(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t slice,
                           const void* packed, void* scratch, const AttentionGradient& g) {
  const PackedKeys<T> keys(in, row, kv_head, true, packed);
  const BackwardScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const Partial<T> sums(in, row, kv_head, slice, g);
  const TileUse<Product<T>> use;
  clear(sums.dk, row.padded_keys() * t.columns(in));
  clear(sums.dk + sums.between, row.padded_keys() * t.columns(in));
  for (int64_t i = slice; i < row.n_tiles(in); i += row.n_slices) {
    const Tile tile(in, row, kv_head, i);
    load_tile<T>(in, row, tile, t, g);
    clear(t.dq, keys.width(in) * kLanes);
    const int64_t end = round_up(t.range->end, kPad);
    for (int64_t key = t.range->template first<Product<T>>(), next; key < t.range->end; key = next) {
      next = (key / kKeys + 1) * kKeys;
      const int64_t n = at_most(next, end) - key;
      backward_keys<T>(in, keys, t, tile.lanes(), key, n, sums);
    }
    store_transposed<T>(t.dq, t.factor, tile.lanes(), in.head_dim, [&](int64_t l) {
      const int64_t query = row.q_begin + tile.position(l);
      return static_cast<T*>(g.dq) + (query * in.q_heads + tile.head(l)) * in.head_dim;
    });
  }
}

// Adds the slices' sums and writes the row's dk and dv for one key/value head.
template <class T>
static void sum_slices(const AttentionInput& in, const AttentionRow& row, int64_t kv_head,
                       const AttentionGradient& g) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t columns = BackwardScratch<T>::columns(in), next = row.padded_keys() * columns;
  const Partial<T> first(in, row, kv_head, 0, g);
  const auto write = [&](const C* from, T* to, C scale) {
    for (int64_t d = 0; d < in.head_dim; d += W) {
      V<C> total = {};
      for (int64_t slice = 0; slice < row.n_slices; ++slice) total += load(from + slice * next + d);
      const int64_t left = in.head_dim - d;
      left >= W ? store(to + d, total * scale) : store_n(to + d, total * scale, left);
    }
  };
  for (int64_t key = 0; key < row.n_keys; ++key) {
    const int64_t to = ((row.k_begin + key) * in.kv_heads + kv_head) * in.head_dim;
    write(first.dk + key * columns, static_cast<T*>(g.dk) + to, C(in.scale));
    write(first.dk + first.between + key * columns, static_cast<T*>(g.dv) + to, C(1));
  }
}
