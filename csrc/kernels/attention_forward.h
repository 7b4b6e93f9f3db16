// Forward attention over one query tile: online softmax over tiles of kForwardKeys keys (FlashAttention-2),
// transposed.
//
//     S^T = K Q^T - shift,    P^T = 2^(c S^T),    O^T = O^T 2^(c (old shift - shift)) + V^T P^T
//
// Scores never reach memory: a block of them becomes weights in the registers that it was summed up in, which begin
// at minus the shift. That needs the shift before the row's maximum is known, so the shift is the largest score of
// some earlier block, and is raised only when a score exceeds it by kSlack powers of two. Then O^T, the sums and
// the tile's weights are rescaled, which is rare; the results do not depend on what is subtracted, and weights up
// to 2^kSlack cost no accuracy.
//
// With AMX tiles, a tile of scores is computed at once and read back block by block; all else is the same.
constexpr int64_t kLanesAhead = 2;  // asked for with every block of keys
// P^T in bf16 takes 12 KiB of the first-level cache, O^T another 12 at head_dim 64. AMX needs larger products, and
// CPUs with it have 2 MiB of second-level cache.
#if defined(ICAE_AMX)
constexpr int64_t kForwardKeys = kColumnTile;
#else
constexpr int64_t kForwardKeys = 128;
#endif

// Of each lane: the shift, how far above it a score may be (minus infinity while there is no shift yet), and the
// sum of weights.
template <class C>
struct Softmax {
  C shift[kLanes], slack[kLanes], sum[kLanes];
};

// Where a tile's rows of q are, and those of the output.
template <class T>
struct TileRows {
  const AttentionInput& in;
  const AttentionRow& row;
  const AttentionOutput& to;
  const Tile& tile;

  const T* q(int64_t lane) const { return row_of<T>(in.q, row.q_begin + tile.position(lane), tile.head(lane)); }
  template <class O>
  O* out(int64_t lane) const {
    const int64_t query = row.q_begin + tile.position(lane) - to.first;
    return static_cast<O*>(to.out) + (query * in.q_heads + tile.head(lane)) * in.head_dim;
  }
};

// Rows of q and of the output of a tile that comes soon, asked for into the second-level cache: they lie too far
// apart for the CPU to foresee, and one miss after the other took a tenth of the time at 4 x 640 tokens (AVX-512).
// A few lanes' at a time, between products: all at once waited for one another.
template <class T>
struct RowsAhead {
  const char *q[kLanes], *out[kLanes];
  int64_t lanes = 0, next = 0, q_bytes = 0, out_bytes = 0;

  void plan(const AttentionInput& in, const NextTile& soon, const AttentionOutput& to) {
    lanes = next = 0;
    if (soon.row == nullptr) return;
    const Tile tile(in, *soon.row, soon.kv_head, soon.tile);
    const TileRows<T> rows{in, *soon.row, to, tile};
    lanes = tile.lanes();
    q_bytes = in.head_dim * sizeof(T);
    out_bytes = in.head_dim * (to.partial ? sizeof(typename Elem<T>::C) : sizeof(T));
    for (int64_t l = 0; l < lanes; ++l) {
      q[l] = reinterpret_cast<const char*>(rows.q(l));
      out[l] = to.partial ? reinterpret_cast<const char*>(rows.template out<typename Elem<T>::C>(l))
                          : reinterpret_cast<const char*>(rows.template out<T>(l));
    }
  }
  ICAE_FORCED void ask(int64_t n) {
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
  E* q;                      // (steps, kLanes, pair)
  typename Values<T>::E* p;  // (kForwardKeys / pair, kLanes, pair)
  C* o;                      // (width, kLanes)
  C* s;                      // with tiles: (kForwardKeys, kLanes)
  Softmax<C>* softmax;
  KeyRange<C>* range;
  RowsAhead<T>* ahead;

  ForwardScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    q = arena.take<E>(PackedKeys<T>::width(in) * kLanes);
    p = arena.take<typename Values<T>::E>(kForwardKeys * kLanes);
    o = arena.take<C>(PackedKeys<T>::width(in) * kLanes);
    s = arena.take<C>(P::kTiles ? kForwardKeys * kLanes : 0);
    softmax = arena.take<Softmax<C>>(1);
    range = arena.take<KeyRange<C>>(1);
    ahead = arena.take<RowsAhead<T>>(1);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

// Some lanes of one tile of keys, as many as a block of registers is wide: O^T follows P^T from key to key.
template <class T, int vectors>
struct LaneGroup {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  static constexpr int W = Vec<C>::kWidth;

  const AttentionInput& in;
  const PackedKeys<T>& keys;
  const ForwardScratch<T>& t;
  int64_t first;  // lane
  const Weights<T>& weights;
  bool careful;   // looks for NaN in every block
  int64_t tile;   // first key of the tile
  bool& started;  // O^T holds something

  // O^T += V^T P^T for the tile's keys, up to `end`.
  void add_values(int64_t end) {
    if constexpr (P::kTiles) {
      add_by_tiles(end);
    } else if constexpr (Values<T>::kHalf) {
      add_in_half(end);
    } else {
      add_by_blocks(end);
    }
    started = true;
  }

  void add_by_blocks(int64_t end) {
    const Left<E> v = keys.columns(in, keys.v_steps, tile);
    const Right<E> p{t.p + first * P::kPair, kLanes * P::kPair};
    for (int64_t d = 0; d < keys.width(in); d += kBlockRows) {
      const Left<E> part{v.data + d / kBlockRows * v.block, v.row, v.step};
      C* o = t.o + d * kLanes + first;
      const int64_t steps = (end - tile) / P::kPair;
      started ? multiply_block<P, vectors, Into::kAdd>(part, p, steps, o, kLanes)
              : multiply_block<P, vectors, Into::kSet>(part, p, steps, o, kLanes);
    }
  }

  void add_in_half(int64_t end) {
#if defined(ICAE_FP16)
    static_assert(kHalfKeys % kForwardKeys == 0, "a tile has one scale");
    const HalfValues values = keys.half_values(in);
    for (int64_t d = 0; d < values.width; d += kBlockRows) {
      multiply_half<vectors>(values.block(d, tile), values.scales(tile) + d, t.p + first * 2, (end - tile) / 2,
                             started, t.o + d * kLanes + first);
    }
#endif
  }

  // Keys past `end` weigh nothing in the product of whole tiles of the CPU's.
  void add_by_tiles(int64_t end) {
    const int64_t depth = round_up(end - tile, kTileDepth);
    clear(t.p + (end - tile) * kLanes, (tile + depth - end) * kLanes);
    const Left<E> v = keys.columns(in, keys.v_steps, tile);
    multiply_tiles(v.data, v.row, keys.width(in), t.p, kLanes, vectors * W, depth, started, t.o, kLanes);
  }

  // S^T of the tile's keys up to `end`.
  void score_by_tiles(int64_t end) {
    static_assert(kLanes <= kBlockVectors * W || !P::kTiles, "one group has all lanes");
    const int64_t width = keys.width(in);
    multiply_tiles(keys.k_rows + tile * width, width, round_up(end - tile, kTileDepth), t.q, kLanes, vectors * W,
                   width, false, t.s, kLanes);
  }

  // The largest score of each lane. A NaN among the scores makes it NaN.
  ICAE_INLINE V<C> largest(const Block<P, vectors>& s, int n) {
    V<C> largest = s[0][n], any_nan = s[0][n];
#pragma GCC unroll 8
    for (int m = 1; m < kBlockRows; ++m) {
      largest = vmax(largest, s[m][n]);
      any_nan = s[m][n] == s[m][n] ? any_nan : s[m][n];
    }
    return any_nan == any_nan ? largest : any_nan;
  }

  // Raises the shift of the lanes that have a score above their slack to at least the largest one, and rescales the
  // weights of the tile's keys before this one, O^T and the sum. `s` becomes relative to the new shift, which
  // differs from the old one by whole powers of two, so that no weight is rounded again. A NaN or an infinite score
  // makes a lane NaN, for good.
  __attribute__((noinline)) void raise(int64_t key, Block<P, vectors>& s) {
    for (int n = 0; n < vectors; ++n) {
      Softmax<C>& softmax = *t.softmax;
      const int64_t lane = first + n * W;
      const V<C> highest = largest(s, n), slack = load(softmax.slack + lane);
      const I<C> rises = ~(highest <= slack);
      if (!any<C>(rises)) continue;
      const V<C> above = highest + (highest - highest);  // NaN where it is infinite
      // The sum is 0 before the first shift, and a lane's O^T anything finite.
      const I<C> again = rises & (slack != -kInfinity<C>);
      const V<C> powers = again ? (above * weights.exponent + Vec<C>::kRound) - Vec<C>::kRound + C(1) : V<C>{};
      const V<C> by = again ? powers / weights.exponent : rises ? above : V<C>{};
      // 2^-powers, or 0, or NaN, which has no integer.
      const V<C> most = set1(C(Vec<C>::kBias));
      const I<C> lost = __builtin_convertvector(powers < most ? powers : most, I<C>);
      const V<C> factor = (V<C>)((I<C>{} + Vec<C>::kBias - lost) << Vec<C>::kMantissa) + (by - by);
      store(softmax.shift + lane, load(softmax.shift + lane) + by);
      store(softmax.slack + lane, rises ? set1(C(kSlack) / weights.exponent) : slack);
      store(softmax.sum + lane, load(softmax.sum + lane) * factor);
      for (int64_t d = 0; d < keys.width(in) && started; ++d) {
        C* o = t.o + d * kLanes + lane;
        store(o, load(o) * factor);
      }
      scale_weights(t.p + lane * Values<T>::kPair, key - tile, factor);
      for (int m = 0; m < kBlockRows; ++m) s[m][n] -= by;
    }
  }

  // Scores of kBlockRows keys, and from them weights.
  template <bool masked>
  ICAE_FORCED void weigh(int64_t key) {
    const int64_t width = keys.width(in);
    Softmax<C>& softmax = *t.softmax;
    Block<P, vectors> s;
    if constexpr (P::kTiles) load_block<P, vectors>(s, t.s + (key - tile) * kLanes, kLanes);
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const V<C> shift = load(softmax.shift + first + n * W);
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; ++m) s[m][n] = P::kTiles ? s[m][n] - shift : -shift;
    }
    if constexpr (!P::kTiles) {
      multiply_into<P, vectors>(s, {keys.k_rows + key * width, width, P::kPair},
                                {t.q + first * P::kPair, kLanes * P::kPair}, ceil_div(in.head_dim, P::kPair));
    }
    I<C> rises = {};
    if constexpr (!Weights<T>::kKeepsNan) {
      // What is not finite in a key makes all lanes' scores so; in a query, `careful` tells.
      V<C> total = s[0][0];
#pragma GCC unroll 8
      for (int m = 1; m < kBlockRows; ++m) total += s[m][0];
      const V<C> zero = total - total;
      rises = zero != zero;
    }
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t lane = first + n * W;
      if constexpr (masked) {
        const I<C> low = load_int<C>(t.range->low + lane), high = load_int<C>(t.range->high + lane);
#pragma GCC unroll 8
        for (int m = 0; m < kBlockRows; ++m) {
          s[m][n] = t.range->reads(key + m, low, high) ? s[m][n] : set1(-kInfinity<C>);
        }
      }
      V<C> even = s[0][n], odd = s[1][n];  // two chains, since a maximum takes four cycles
#pragma GCC unroll 4
      for (int m = 2; m < kBlockRows; m += 2) {
        even = vmax(even, s[m][n]);
        odd = vmax(odd, s[m + 1][n]);
      }
      rises |= ~(vmax(even, odd) <= load(softmax.slack + lane));
    }
    if (__builtin_expect(careful || any<C>(rises), 0)) {
      Block<P, vectors> copy;  // `s` itself stays in registers if its address is not taken
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) copy[m][n] = s[m][n];
      }
      raise(key, copy);
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) s[m][n] = copy[m][n];
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t lane = first + n * W;
      const V<C> total = load(softmax.sum + lane);
      typename Weights<T>::Sum sum = weights.begin(total);
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; m += 2) {
        weights.of_pair(s[m][n], s[m + 1][n], t.p + (key - tile + m) * kLanes + lane * Values<T>::kPair, sum);
      }
      store(softmax.sum + lane, weights.end(sum, total));
    }
  }

  void attend(int64_t end) {
    if constexpr (P::kTiles) score_by_tiles(end);
    for (int64_t key = tile; key < end; key += kBlockRows) {
      t.ahead->ask(kLanesAhead);
      t.range->cut(key, key + kBlockRows) ? weigh<true>(key) : weigh<false>(key);
    }
    add_values(end);
  }
};

// Writes the log-sum-exp, and leaves 1 / sum where the sums were.
template <class T>
static void store_lse(const AttentionInput& in, const AttentionRow& row, const Tile& tile,
                      const ForwardScratch<T>& t, const AttentionOutput& to) {
  using C = typename Elem<T>::C;
  Softmax<C>& softmax = *t.softmax;
  const C scale = C(exponent_scale(in.scale) * 0.6931471805599453);
  for (int64_t l = 0; l < kLanes; l += Vec<C>::kWidth) {
    const V<C> total = load(softmax.sum + l);
    const V<C> lse = load(softmax.shift + l) * scale + log_of(total);
    store(softmax.shift + l, total == V<C>{} ? set1(-kInfinity<C>) : lse);
    store(softmax.sum + l, total == V<C>{} ? V<C>{} : C(1) / total);
  }
  for (int64_t l = 0; l < tile.lanes(); ++l) {
    static_cast<C*>(to.lse)[tile.head(l) * to.n + row.q_begin + tile.position(l) - to.first] = softmax.shift[l];
  }
}

template <class T>
static void forward_tile(const AttentionInput& in, const AttentionRow* key_rows, int64_t n_rows, int64_t kv_head,
                         int64_t tile_index, const NextTile& soon, const void* packed, void* scratch,
                         const AttentionOutput& to) {
  using P = Product<T>;
  using C = typename P::C;
  const AttentionRow& row = key_rows[0];
  const Tile tile(in, row, kv_head, tile_index);
  const ForwardScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const TileUse<P> use;
  const TileRows<T> rows{in, row, to, tile};
  const int64_t lanes = tile.lanes(), size = PackedKeys<T>::width(in);
  t.ahead->plan(in, soon, to);
  pack_transposed<P, T>([&](int64_t l) { return rows.q(l); }, lanes, in.head_dim, in.scale < 0, t.q);
  if constexpr (P::kTiles) clear_past<P>(t.q, in.head_dim, size);
  for (int64_t l = 0; l < kLanes; ++l) {
    t.softmax->shift[l] = 0;
    t.softmax->slack[l] = -kInfinity<C>;
    t.softmax->sum[l] = 0;
  }
  const Weights<T> weights(C(exponent_scale(in.scale)));
  bool careful = false;
  if constexpr (!Weights<T>::kKeepsNan) {
    // Not of lanes past these, which hold whatever the thread left there.
    const int64_t packed_lanes = round_up(lanes, Vec<C>::kWidth);
    for (int64_t s = 0; s < ceil_div(in.head_dim, P::kPair) && !careful; ++s) {
      careful = !all_finite(t.q + s * kLanes * P::kPair, packed_lanes * P::kPair);
    }
  }
  in_blocks(ceil_div(lanes, Vec<C>::kWidth), [&](int64_t n, int64_t width) {
    const int64_t lane = n * Vec<C>::kWidth;
    bool started = false;
    for (int64_t r = 0; r < n_rows; ++r) {
      const PackedKeys<T> keys(in, key_rows[r], kv_head, false, packed);
      t.range->set(in, key_rows[r], tile);
      const int64_t end = round_up(t.range->end, kPad);
      for (int64_t key = t.range->template first<P>(), next; key < t.range->end; key = next) {
        next = (key / kForwardKeys + 1) * kForwardKeys;
        const int64_t stop = at_most(next, end);
        if (width == 3) {
          LaneGroup<T, 3>{in, keys, t, lane, weights, careful, key, started}.attend(stop);
        } else if (width == 2) {
          LaneGroup<T, 2>{in, keys, t, lane, weights, careful, key, started}.attend(stop);
        } else {
          LaneGroup<T, 1>{in, keys, t, lane, weights, careful, key, started}.attend(stop);
        }
      }
    }
    for (int64_t d = 0; d < size && !started; ++d) clear(t.o + d * kLanes + lane, width * Vec<C>::kWidth);
  });
  t.ahead->ask(kLanes);  // of those that are left
  store_lse(in, row, tile, t, to);
  if (to.partial) {
    store_transposed<C>(t.o, t.softmax->sum, lanes, in.head_dim,
                        [&](int64_t l) { return rows.template out<C>(l); });
  } else {
    store_transposed<T>(t.o, t.softmax->sum, lanes, in.head_dim,
                        [&](int64_t l) { return rows.template out<T>(l); });
  }
}
