// What the attention kernels share: memory layout, query tiles, masks.
//
// Everything is transposed: a tile of scores is S^T, keys down and lanes across. A lane is one (position, query
// head) pair of the row, heads of one key/value head running fastest, so that K and V are read once for the whole
// group. Maximum and sum over the keys are then plain vertical vector operations, and no score is ever reduced
// across a register.

// Keys of a tile. S^T in fp32 takes 12 KiB of the 32 KiB of L1; with 96, 128 or 192 keys the times at 4 x 640 and
// 1 x 2560 tokens differed by less than 3 % (AVX-512, two threads).
constexpr int64_t kKeys = 64;
static_assert(kPackedKeys % kKeys == 0 && kPackedKeys % kColumnTile == 0, "a task packs whole tiles");

// Hands out pieces of one allocation; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* piece = base == nullptr ? nullptr : reinterpret_cast<X*>(base + used);
    used += round_up(n * static_cast<int64_t>(sizeof(X)), 64);
    return piece;
  }
};

// Packed keys and values of one (row, key/value head). The forward needs K by rows and V by steps, the backward
// also K by steps and V by rows; where a step is one element the two are the same matrix. Tiles take V^T and K^T by
// rows in place of the steps.
template <class T>
struct PackedKeys {
  using P = Product<T>;
  using E = typename P::E;
  E *k_rows, *v_steps, *k_steps, *v_rows;
  int64_t padded;

  static int64_t width(const AttentionInput& in) { return round_up(in.head_dim, P::kTiles ? kTileDepth : kPad); }
  static int matrices(bool backward) { return backward && P::kPair == 2 ? 3 : 2; }

  PackedKeys(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, bool backward, const void* base) {
    const int64_t matrix = in.packed_keys * width(in);
    const int64_t head = in.one_head_packed ? 0 : kv_head;
    E* first = static_cast<E*>(const_cast<void*>(base)) + head * matrices(backward) * matrix +
               row.packed_begin * width(in);
    k_rows = first;
    k_steps = P::kPair == 1 ? first : first + 2 * matrix;
    v_rows = v_steps = first + matrix;
    padded = row.padded_keys();
  }

#if defined(ICAE_FP16)
  HalfValues half_values(const AttentionInput& in) const { return {v_steps, width(in), padded}; }
#endif

  // V^T or K^T from `key` on.
  Left<E> columns(const AttentionInput& in, const E* steps, int64_t key) const {
    if constexpr (P::kTiles) {
      const int64_t piece = key / kColumnTile * kColumnTile;
      return {steps + piece * width(in) + key - piece, at_most(kColumnTile, padded - piece), P::kPair};
    }
    if constexpr (P::kPair == 2) {
      return {steps + key * kBlockRows, P::kPair, kBlockRows * P::kPair, kBlockRows * padded};
    }
    return {steps + key * width(in), P::kPair, width(in) * P::kPair};
  }
};

template <class T>
static int64_t packed_bytes(const AttentionInput& in, bool backward) {
  using K = PackedKeys<T>;
  return in.packed_heads() * K::matrices(backward) * in.packed_keys * K::width(in) * sizeof(typename K::E);
}

template <class T>
static const T* row_of(const Strided& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row + head * x.head;
}

// Keys from `first` to `last`, or to the end of the padded row, of which `first` is a multiple of kPackedKeys.
template <class T>
static void pack_keys(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t first,
                      int64_t last, bool backward, void* packed) {
  using P = Product<T>;
  const PackedKeys<T> to(in, row, kv_head, backward, packed);
  const int64_t width = to.width(in), padded = row.padded_keys(), end = at_most(last, padded);
  const int64_t n = at_least(0, at_most(row.n_keys, end) - first);
  const T* k = row_of<T>(in.k, row.k_begin, kv_head);
  const T* v = row_of<T>(in.v, row.k_begin, kv_head);
  const auto by_steps = [&](const T* from, int64_t stride, typename P::E* out) {
    const auto row_at = [=](int64_t r) { return from + r * stride; };
    if constexpr (P::kTiles) {
      pack_columns(row_at, first, end, row.n_keys, in.head_dim, out, width, padded);
#if defined(ICAE_AVX512)
    } else if constexpr (P::kPair == 2) {
      pack_column_blocks(row_at, first, end, row.n_keys, in.head_dim, out, width, padded);
#endif
    } else {
      const auto part = [=](int64_t r) { return from + (first + r) * stride; };
      pack_steps<P, T>(part, n, in.head_dim, out + first * width, width, end - first);
    }
  };
  const auto by_rows = [&](const T* from, int64_t stride, typename P::E* out) {
    pack_rows(from + first * stride, stride, n, in.head_dim, out + first * width, width, end - first);
  };
  by_rows(k, in.k.row, to.k_rows);
  if (backward && P::kPair == 2) {
    by_steps(k, in.k.row, to.k_steps);
    by_rows(v, in.v.row, to.v_rows);
    return;
  }
#if defined(ICAE_FP16)
  if constexpr (Values<T>::kHalf) {
    if (!backward) {
      return pack_half_values(v, in.v.row, first, end, row.n_keys, in.head_dim, to.half_values(in));
    }
  }
#endif
  by_steps(v, in.v.row, to.v_steps);
}

// The lanes of one query tile.
struct Tile {
  int64_t first_position, n_positions, first_head, n_heads;

  Tile(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t tile) {
    const int64_t chunk = tile % in.head_chunks() * in.heads_per_tile();
    first_position = tile / in.head_chunks() * in.positions_per_tile();
    n_positions = at_most(in.positions_per_tile(), row.n_queries - first_position);
    first_head = kv_head * in.group() + chunk;
    n_heads = at_most(in.heads_per_tile(), in.group() - chunk);
    int64_t lane = 0;
    for (int64_t p = 0; p < n_positions; ++p) {
      for (int64_t h = 0; h < n_heads; ++h, ++lane) {
        positions[lane] = static_cast<int32_t>(first_position + p);
        heads[lane] = static_cast<int32_t>(first_head + h);
      }
    }
  }
  int64_t lanes() const { return n_positions * n_heads; }
  int64_t position(int64_t lane) const { return positions[lane]; }
  int64_t head(int64_t lane) const { return heads[lane]; }

 private:
  int32_t positions[kLanes], heads[kLanes];  // of each lane: a division for each would cost as much as its copying
};

// Keys from low[l] up to but not high[l] are those that lane l reads.
template <class C>
struct KeyRange {
  typename Vec<C>::Int low[kLanes], high[kLanes];
  int64_t begin, end;          // what any lane reads
  int64_t all_begin, all_end;  // what every lane reads

  // Of the tile's lanes, and of the others that a kernel reads, which then read nothing.
  void set(const AttentionInput& in, const AttentionRow& row, const Tile& tile, int64_t filled = kLanes) {
    const int64_t lanes = tile.lanes();
    begin = all_end = row.n_keys;
    end = all_begin = 0;
    for (int64_t l = 0; l < filled; ++l) {
      const int64_t after = l < lanes ? row.position(tile.position(l)) + 1 : 0;
      high[l] = at_least(0, at_most(after, row.n_keys));
      low[l] = in.window == 0 ? 0 : at_least(0, after - in.window);
      if (l >= lanes) continue;
      begin = at_most(begin, low[l]);
      end = at_least(end, high[l]);
      all_begin = at_least(all_begin, low[l]);
      all_end = at_most(all_end, high[l]);
    }
    begin = begin / kPad * kPad;
  }
  // Where to begin: keys before `begin` that fill up a tile are masked.
  template <class P>
  int64_t first() const {
    return P::kTiles ? begin / kTileDepth * kTileDepth : begin;
  }
  bool cut(int64_t from, int64_t to) const { return from < all_begin || to > all_end; }

  ICAE_INLINE I<C> reads(int64_t key, I<C> low_lanes, I<C> high_lanes) {
    const I<C> k = set1_int<C>(key);
    return (k >= low_lanes) & (k < high_lanes);
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

// The softmax's weights are 2^(score * exponent): |scale| log2(e). The sign of a negative scale goes into Q.
// A scale of 0 would turn a masked -inf into a NaN; this small it gives the same weights.
static inline double exponent_scale(double scale) {
  const double size = scale < 0 ? -scale : scale;
  return (size < 1e-30 ? 1e-30 : size) * 1.4426950408889634;
}

#if defined(ICAE_AVX512)
// 16 lanes of up to 16 rows of x[dim][kLanes], times `factor`, as 16 rows.
ICAE_INLINE void load_transposed(const float* x, V<float> factor, int64_t n, __m512i (&block)[16]) {
  for (int i = 0; i < 16; ++i) {
    block[i] = i < n ? (__m512i)(load(x + i * kLanes) * factor) : _mm512_setzero_si512();
  }
  transpose(block);
}

// Lines of 32 elements at once: written in halves, each line is waited for twice.
template <class Row>
static inline void store_transposed_lines(const float* x, const float* factor, int64_t lanes, int64_t dim,
                                          Row row) {
  for (int64_t l = 0; l < lanes; l += 16) {
    const V<float> f = load(factor + l);
    const int64_t n = at_most(16, lanes - l);
    bf16* to[16];
    for (int64_t i = 0; i < n; ++i) to[i] = row(l + i);
    for (int64_t d = 0; d < dim; d += 32) {
      __m512i low[16], high[16];
      load_transposed(x + d * kLanes + l, f, 16, low);
      load_transposed(x + (d + 16) * kLanes + l, f, 16, high);
      for (int64_t i = 0; i < n; ++i) {
        _mm512_storeu_si512(to[i] + d, (__m512i)_mm512_cvtne2ps_pbh((__m512)high[i], (__m512)low[i]));
      }
    }
  }
}
#endif

// Writes a transposed tile x[dim][kLanes], times `factor` of each lane, to `row(lane)`.
template <class T, class Row>
static inline void store_transposed(const typename Elem<T>::C* x, const typename Elem<T>::C* factor, int64_t lanes,
                                    int64_t dim, Row row) {
#if defined(ICAE_AVX512)
  if constexpr (sizeof(typename Elem<T>::C) == 4) {
    if constexpr (sizeof(T) == 2) {
      if (dim % 32 == 0) return store_transposed_lines(x, factor, lanes, dim, row);
    }
    for (int64_t l = 0; l < lanes; l += 16) {
      const V<float> f = load(factor + l);
      for (int64_t d = 0; d < dim; d += 16) {
        __m512i block[16];
        const int64_t n = at_most(16, dim - d);
        load_transposed(x + d * kLanes + l, f, n, block);
        for (int i = 0; i < 16 && l + i < lanes; ++i) {
          T* to = row(l + i) + d;
          n == 16 ? store(to, (V<float>)block[i]) : store_n(to, (V<float>)block[i], n);
        }
      }
    }
    return;
  }
#endif
  for (int64_t l = 0; l < lanes; ++l) {
    T* to = row(l);
    for (int64_t d = 0; d < dim; ++d) assign(to + d, x[d * kLanes + l] * factor[l]);
  }
}
