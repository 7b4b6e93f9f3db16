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
  C *s, *dp;                // with tiles: (kKeys, kLanes)
  C* weights;               // without: (kBlockRows, kLanes)
  E *p, *ds;                // by rows, (kKeys, kLaneDepth)
  E* ds_steps;              // (kKeys / pair, kLanes, pair): ds itself where operands are not narrowed
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

// Weights of one key and some lanes from their scores; dS^T follows from them, without the scale.
template <class T, bool masked>
struct LaneGradient {
  using P = Product<T>;
  using C = typename P::C;
  const BackwardScratch<T>& t;
  int64_t lane, key;  // the first of each: of the vector, and of the key tile
  C exponent;
  const V<C> lse;
  const I<C> low, high;

  LaneGradient(const BackwardScratch<T>& t, int64_t lane, int64_t key, C exponent)
      : t(t),
        lane(lane),
        key(key),
        exponent(exponent),
        lse(load(t.lse + lane)),
        low(load_int<C>(t.range->low + lane)),
        high(load_int<C>(t.range->high + lane)) {}

  ICAE_FORCED V<C> weight(int64_t k, V<C> score) const {
    const V<C> p = exp2<C, Elem<T>::kExpDegree>(score * exponent - lse);
    return masked ? (t.range->reads(key + k, low, high) ? p : V<C>{}) : p;
  }
  // Of the keys k and k + 1 of the tile.
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

// P^T and dS^T of n keys and all lanes, of S^T and dP^T that lie in memory.
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

// The same of kBlockRows keys, from the k-th of the tile on, whose S^T and dP^T are summed up in registers and do
// not leave them: only the weights lie in memory meanwhile, 1.5 KiB of them.
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
  in_blocks(vectors, [&](int64_t first, int64_t width) {
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

// Makes what the products of dK, dV and dQ read of keys from n up to `padded` zero.
template <class T>
static inline void clear_keys(const BackwardScratch<T>& t, int64_t n, int64_t padded) {
  clear(t.p + n * t.kLaneDepth, (padded - n) * t.kLaneDepth);
  clear(t.ds + n * t.kLaneDepth, (padded - n) * t.kLaneDepth);
  clear(t.ds_steps + n * kLanes, (padded - n) * kLanes);
}

// One (query tile, key tile) pair: `key` is the first of n keys, whose sums begin here with Into::kSet.
template <class T, Into into>
static void backward_keys(const AttentionInput& in, const PackedKeys<T>& keys, const BackwardScratch<T>& t,
                          int64_t lanes, int64_t key, int64_t n, const Partial<T>& sums) {
  using P = Product<T>;
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = keys.width(in), columns = t.columns(in);
  const int64_t vectors = ceil_div(lanes, W);
  const int64_t lane_steps = (P::kTiles ? round_up(vectors * W, kTileDepth) : vectors * W) / P::kPair;
  const int64_t padded = P::kTiles ? round_up(n, kTileDepth) : n;
  const C c = C(exponent_scale(in.scale));
  const bool cut = t.range->cut(key, key + n);
  if constexpr (P::kTiles) {
    const int64_t steps = width / P::kPair;
    multiply<P, Into::kSet>({keys.k_rows + key * width, width, P::kPair}, padded, {t.q, kLanes * P::kPair}, vectors,
                            steps, t.s, kLanes);
    multiply<P, Into::kSet>({keys.v_rows + key * width, width, P::kPair}, padded, {t.dout, kLanes * P::kPair},
                            vectors, steps, t.dp, kLanes);
    cut ? differentiate_scores<T, true>(t, vectors, key, n, c)
        : differentiate_scores<T, false>(t, vectors, key, n, c);
    clear_keys(t, n, padded);
  } else {
    cut ? differentiate_keys<T, true>(in, keys, t, vectors, key, n, c)
        : differentiate_keys<T, false>(in, keys, t, vectors, key, n, c);
  }
  multiply<P, into>({t.ds, t.kLaneDepth, P::kPair}, padded, {t.q_steps, columns * P::kPair}, columns / W,
                    lane_steps, sums.dk + key * columns, columns);
  multiply<P, into>({t.p, t.kLaneDepth, P::kPair}, padded, {t.dout_steps, columns * P::kPair}, columns / W,
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
  const auto clear_sums = [&](int64_t first, int64_t last) {
    clear(sums.dk + first * t.columns(in), (last - first) * t.columns(in));
    clear(sums.dk + sums.between + first * t.columns(in), (last - first) * t.columns(in));
  };
  // The last tile goes first: it reads the most keys, whose sums it begins, and tiles before it begin at most keys
  // that lie before those. Making all sums zero beforehand took 5 % of the time at 640 tokens.
  int64_t begun = row.padded_keys();
  for (int64_t i = slice + (row.n_tiles(in) - 1 - slice) / row.n_slices * row.n_slices; i >= 0; i -= row.n_slices) {
    const Tile tile(in, row, kv_head, i);
    load_tile<T>(in, row, tile, t, g);
    clear(t.dq, keys.width(in) * kLanes);
    const int64_t end = round_up(t.range->end, kPad);
    for (int64_t key = t.range->template first<Product<T>>(), next; key < t.range->end; key = next) {
      next = at_most((key / kKeys + 1) * kKeys, end);
      if (key < begun) {
        next = at_most(next, begun);
        backward_keys<T, Into::kSet>(in, keys, t, tile.lanes(), key, next - key, sums);
      } else {
        backward_keys<T, Into::kAdd>(in, keys, t, tile.lanes(), key, next - key, sums);
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

// Adds the slices' sums and writes dk and dv of the row's keys from `first` to `last` for one key/value head.
template <class T>
static void sum_slices(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t first,
                       int64_t last, const AttentionGradient& g) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t columns = BackwardScratch<T>::columns(in), next = row.padded_keys() * columns;
  const Partial<T> sums(in, row, kv_head, 0, g);
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
