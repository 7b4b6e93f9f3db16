// Forward attention over one query tile: online softmax over tiles of kForwardKeys keys (FlashAttention-2),
// transposed.
//
//     S^T = K Q^T,    P^T = 2^(c S^T - shift),    O^T = O^T 2^(old shift - shift) + V^T P^T
//
// Scores never reach memory: a block of them becomes weights in the registers that it was summed up in. That needs
// the shift before the row's maximum is known, so the shift is the largest score of some earlier block, and is
// raised only when a score exceeds it by kSlack powers of two. Then O^T and the sums are rescaled, which is rare;
// the results do not depend on what is subtracted, and weights up to 2^kSlack cost no accuracy.
//
// With AMX tiles, a tile of scores is computed at once and read back block by block; all else is the same.
constexpr int kSlack = 8;
// P^T in bf16 takes 12 KiB of the first-level cache, O^T another 12 at head_dim 64. AMX needs larger products, and
// CPUs with it have 2 MiB of second-level cache.
#if defined(ICAE_AMX)
constexpr int64_t kForwardKeys = kColumnTile;
#else
constexpr int64_t kForwardKeys = 128;
#endif

// Shift (in powers of two) and sum of weights of each lane.
template <class C>
struct Softmax {
  C shift[kLanes], sum[kLanes];
};

template <class T>
struct ForwardScratch {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  E* q;  // (steps, kLanes, pair)
  E* p;  // (kForwardKeys / pair, kLanes, pair)
  C* o;  // (width, kLanes)
  C* s;  // with tiles: (kForwardKeys, kLanes)
  Softmax<C>* softmax;
  KeyRange<C>* range;

  ForwardScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    q = arena.take<E>(PackedKeys<T>::width(in) * kLanes);
    p = arena.take<E>(kForwardKeys * kLanes);
    o = arena.take<C>(PackedKeys<T>::width(in) * kLanes);
    s = arena.take<C>(P::kTiles ? kForwardKeys * kLanes : 0);
    softmax = arena.take<Softmax<C>>(1);
    range = arena.take<KeyRange<C>>(1);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

// Narrows two keys' weights and stores them as one step.
#if defined(ICAE_AVX512)
ICAE_INLINE __m512i pair_up(V<float> even, V<float> odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}
#endif
template <class P, class C, class E>
ICAE_INLINE void store_steps(E* to, V<C> even, V<C> odd) {
  if constexpr (P::kPair == 1) {
    store(to, even);
    store(to + kLanes, odd);
  } else {
#if defined(ICAE_AVX512)
    _mm512_storeu_si512(to, pair_up(even, odd));
#endif
  }
}

// Some lanes of one tile of keys, as many as a block of registers is wide: O^T follows P^T from key to key.
template <class T, int vectors>
struct LaneGroup {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  static constexpr int W = Vec<C>::kWidth;
  static constexpr int degree = Elem<T>::kExpDegree;

  const AttentionInput& in;
  const PackedKeys<T>& keys;
  const ForwardScratch<T>& t;
  int64_t first;   // lane
  C c;             // of the exponent
  int64_t summed;  // keys before this one are in O^T
  int64_t tile;    // first key of the tile
  bool& started;   // O^T holds something

  // O^T += V^T P^T for the tile's keys up to `end` that are not in it yet.
  void add_values(int64_t end) {
    const int64_t width = keys.width(in), steps = (end - summed) / P::kPair;
    if (steps == 0) return;
    if constexpr (P::kTiles) return add_by_tiles(end);
    const Left<E> v = keys.columns(in, keys.v_steps, summed);
    const Right<E> p{t.p + (summed - tile) * kLanes + first * P::kPair, kLanes * P::kPair};
    for (int64_t d = 0; d < width; d += kBlockRows) {
      const Left<E> part{v.data + d / kBlockRows * v.block, v.row, v.step};
      C* o = t.o + d * kLanes + first;
      started ? multiply_block<P, vectors, Into::kAdd>(part, p, steps, o, kLanes)
              : multiply_block<P, vectors, Into::kSet>(part, p, steps, o, kLanes);
    }
    started = true;
    summed = end;
  }

  // Keys that are in O^T already and those past `end` weigh nothing in the product of the whole tile.
  void add_by_tiles(int64_t end) {
    const int64_t depth = round_up(end - tile, kTileDepth);
    clear(t.p, (summed - tile) * kLanes);
    clear(t.p + (end - tile) * kLanes, (tile + depth - end) * kLanes);
    const Left<E> v = keys.columns(in, keys.v_steps, tile);
    multiply_tiles(v.data, v.row, keys.width(in), t.p, kLanes, vectors * W, depth, started, t.o, kLanes);
    started = true;
    summed = end;
  }

  // S^T of the tile's keys up to `end`.
  void score_by_tiles(int64_t end) {
    static_assert(kLanes <= kBlockVectors * W || !P::kTiles, "one group has all lanes");
    const int64_t width = keys.width(in);
    multiply_tiles(keys.k_rows + tile * width, width, round_up(end - tile, kTileDepth), t.q, kLanes, vectors * W,
                   width, false, t.s, kLanes);
  }

  // Raises the shift of the lanes whose `highest` exceeds it, and rescales what was summed up with the old one.
  __attribute__((noinline)) void raise(int64_t key, const V<C> (&highest)[vectors]) {
    add_values(key);
    for (int n = 0; n < vectors; ++n) {
      Softmax<C>& softmax = *t.softmax;
      const int64_t lane = first + n * W;
      const V<C> old = load(softmax.shift + lane);
      const V<C> shift = highest[n] > old + C(kSlack) ? highest[n] : old;
      const V<C> factor = shift == old ? set1(C(1)) : exp2<C, degree>(old - shift);
      store(softmax.shift + lane, shift);
      store(softmax.sum + lane, load(softmax.sum + lane) * factor);
      for (int64_t d = 0; d < keys.width(in) && started; ++d) {
        C* o = t.o + d * kLanes + lane;
        store(o, load(o) * factor);
      }
    }
  }

  // Scores of kBlockRows keys, and from them weights.
  template <bool masked>
  inline __attribute__((always_inline)) void weigh(int64_t key) {
    const int64_t width = keys.width(in);
    Block<P, vectors> s = {};
    if constexpr (P::kTiles) {
      load_block<P, vectors>(s, t.s + (key - tile) * kLanes, kLanes);
    } else {
      multiply_into<P, vectors>(s, {keys.k_rows + key * width, width, P::kPair},
                                {t.q + first * P::kPair, kLanes * P::kPair}, ceil_div(in.head_dim, P::kPair));
    }
    Softmax<C>& softmax = *t.softmax;
    V<C> highest[vectors];
    bool rises = false;
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
      highest[n] = vmax(even, odd) * c;
      rises |= any<C>(highest[n] > load(softmax.shift + lane) + C(kSlack));
    }
    if (__builtin_expect(rises, 0)) raise(key, highest);
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t lane = first + n * W;
      V<C> shift = load(softmax.shift + lane), total = load(softmax.sum + lane);
      shift = shift == -kInfinity<C> ? V<C>{} : shift;  // a lane without keys so far weighs all at 0
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; m += 2) {
        const V<C> a = exp2<C, degree>(s[m][n] * c - shift), b = exp2<C, degree>(s[m + 1][n] * c - shift);
        total += a + b;
        store_steps<P, C>(t.p + (key - tile + m) * kLanes + lane * P::kPair, a, b);
      }
      store(softmax.sum + lane, total);
    }
  }

  void attend(int64_t end) {
    if constexpr (P::kTiles) score_by_tiles(end);
    for (int64_t key = tile; key < end; key += kBlockRows) {
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
  for (int64_t l = 0; l < tile.lanes(); ++l) {
    const C total = softmax.sum[l];
    static_cast<C*>(to.lse)[tile.head(l) * in.n_queries + row.q_begin + tile.position(l)] =
        total == 0 ? -kInfinity<C> : softmax.shift[l] * C(0.6931471805599453) + log_of(total);
  }
  for (int64_t l = 0; l < kLanes; l += Vec<C>::kWidth) {
    const V<C> total = load(softmax.sum + l);
    store(softmax.sum + l, total == V<C>{} ? V<C>{} : C(1) / total);
  }
}

template <class T>
static void forward_tile(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t tile_index,
                         const void* packed, void* scratch, const AttentionOutput& to) {
  using P = Product<T>;
  using C = typename P::C;
  const Tile tile(in, row, kv_head, tile_index);
  const PackedKeys<T> keys(in, row, kv_head, false, packed);
  const ForwardScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const TileUse<P> use;
  const int64_t lanes = tile.lanes(), vectors = ceil_div(lanes, Vec<C>::kWidth);
  const auto q = [&](int64_t l) { return row_of<T>(in.q, row.q_begin + tile.position(l), tile.head(l)); };
  const auto out = [&](int64_t l) {
    return static_cast<T*>(to.out) + ((row.q_begin + tile.position(l)) * in.q_heads + tile.head(l)) * in.head_dim;
  };
  prefetch_lanes<false, T>(q, lanes, in.head_dim);
  prefetch_lanes<true, T>(out, lanes, in.head_dim);
  pack_transposed<P, T>(q, lanes, in.head_dim, in.scale < 0, t.q);
  if constexpr (P::kTiles) clear_past<P>(t.q, in.head_dim, keys.width(in));
  t.range->set(in, row, tile);
  for (int64_t l = 0; l < kLanes; ++l) {
    t.softmax->shift[l] = -kInfinity<C>;
    t.softmax->sum[l] = 0;
  }
  const int64_t begin = t.range->template first<P>(), end = round_up(t.range->end, kPad);
  if (begin >= t.range->end) clear(t.o, keys.width(in) * kLanes);
  const C c = C(exponent_scale(in.scale));
  in_blocks(vectors, [&](int64_t n, int64_t width) {
    bool started = false;
    for (int64_t key = begin, next; key < t.range->end; key = next) {
      next = (key / kForwardKeys + 1) * kForwardKeys;
      const int64_t stop = at_most(next, end), lane = n * Vec<C>::kWidth;
      if (width == 3) {
        LaneGroup<T, 3>{in, keys, t, lane, c, key, key, started}.attend(stop);
      } else if (width == 2) {
        LaneGroup<T, 2>{in, keys, t, lane, c, key, key, started}.attend(stop);
      } else {
        LaneGroup<T, 1>{in, keys, t, lane, c, key, key, started}.attend(stop);
      }
    }
  });
  store_lse(in, row, tile, t, to);
  store_transposed<T>(t.o, t.softmax->sum, lanes, in.head_dim, out);
}
