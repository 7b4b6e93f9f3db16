// Forward attention over one query tile: online softmax over tiles of kKeys keys (FlashAttention-2), transposed.
//
//     S^T = K Q^T,    P^T = 2^(c S^T - c max),    O^T = O^T factor + V^T P^T

// Running maximum, sum and rescaling factor of each lane.
template <class C>
struct Softmax {
  C max[kLanes], sum[kLanes], factor[kLanes];
};

template <class T>
struct ForwardScratch {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  E* q;  // (steps, kLanes, pair)
  C* s;  // (kKeys, kLanes)
  E* p;  // (kKeys / pair, kLanes, pair): the scores themselves where operands are not narrowed
  C* o;  // (width, kLanes)
  Softmax<C>* softmax;
  KeyRange<C>* range;

  ForwardScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    q = arena.take<E>(round_up(in.head_dim, P::kPair) * kLanes);
    s = arena.take<C>(kKeys * kLanes);
    if constexpr (P::kPair == 1) {
      p = s;
    } else {
      p = arena.take<E>(kKeys * kLanes);
    }
    o = arena.take<C>(PackedKeys<T>::width(in) * kLanes);
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

// Turns n keys' scores into weights for the lanes from j on, and updates those lanes' softmax.
template <class T, bool masked>
static inline void weigh_lanes(const ForwardScratch<T>& t, int64_t j, int64_t n, int64_t key,
                               typename Elem<T>::C c) {
  using P = Product<T>;
  using C = typename P::C;
  constexpr int degree = Elem<T>::kExpDegree;
  C* s = t.s + j;
  Softmax<C>& softmax = *t.softmax;
  const I<C> low = load_int<C>(t.range->low + j), high = load_int<C>(t.range->high + j);
  const V<C> old = load(softmax.max + j);
  V<C> even = old, odd = old;  // two chains, since a maximum takes longer than a load
  for (int64_t k = 0; k < n; k += 2) {
    V<C> a = load(s + k * kLanes), b = load(s + (k + 1) * kLanes);
    if (masked) {
      a = t.range->reads(key + k, low, high) ? a : set1(-kInfinity<C>);
      b = t.range->reads(key + k + 1, low, high) ? b : set1(-kInfinity<C>);
      store(s + k * kLanes, a);
      store(s + (k + 1) * kLanes, b);
    }
    even = vmax(even, a);
    odd = vmax(odd, b);
  }
  const V<C> top = vmax(even, odd);
  const V<C> shift = (top == -kInfinity<C> ? V<C>{} : top) * c;  // a lane without keys so far weighs all at 0
  V<C> sums[2] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < n; k += 2) {
    const V<C> a = exp2<C, degree>(load(s + k * kLanes) * c - shift);
    const V<C> b = exp2<C, degree>(load(s + (k + 1) * kLanes) * c - shift);
    sums[0] += a;
    sums[1] += b;
    store_steps<P, C>(t.p + (k * kLanes + j * P::kPair), a, b);
  }
  const V<C> factor = exp2<C, degree>(old * c - shift);
  store(softmax.max + j, top);
  store(softmax.factor + j, factor);
  store(softmax.sum + j, load(softmax.sum + j) * factor + (sums[0] + sums[1]));
}

template <class T>
static void store_tile(const AttentionInput& in, const AttentionRow& row, const Tile& tile,
                       const ForwardScratch<T>& t, const AttentionOutput& to) {
  using C = typename Elem<T>::C;
  const double c = exponent_scale(in.scale);
  const int64_t lanes = tile.lanes();
  Softmax<C>& softmax = *t.softmax;
  for (int64_t l = 0; l < lanes; ++l) {
    const C total = softmax.sum[l];
    const int64_t query = row.q_begin + tile.position(l);
    static_cast<C*>(to.lse)[tile.head(l) * in.n_queries + query] =
        total == 0 ? -kInfinity<C> : C(softmax.max[l] * (c / 1.4426950408889634) + __builtin_log(double(total)));
    softmax.factor[l] = total == 0 ? C(0) : 1 / total;
  }
  store_transposed<T>(t.o, softmax.factor, lanes, in.head_dim, [&](int64_t l) {
    return static_cast<T*>(to.out) + ((row.q_begin + tile.position(l)) * in.q_heads + tile.head(l)) * in.head_dim;
  });
}

template <class T>
static void forward_tile(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t tile_index,
                         const void* packed, void* scratch, const AttentionOutput& to) {
  using P = Product<T>;
  using C = typename P::C;
  const Tile tile(in, row, kv_head, tile_index);
  const PackedKeys<T> keys(in, row, kv_head, false, packed);
  const ForwardScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const int64_t lanes = tile.lanes(), width = keys.width(in), vectors = ceil_div(lanes, Vec<C>::kWidth);
  pack_transposed<P, T>([&](int64_t l) { return row_of<T>(in.q, row.q_begin + tile.position(l), tile.head(l)); },
                        lanes, in.head_dim, in.scale < 0, t.q);
  t.range->set(in, row, tile);
  for (int64_t l = 0; l < kLanes; ++l) {
    t.softmax->max[l] = -kInfinity<C>;
    t.softmax->sum[l] = 0;
  }
  clear(t.o, width * kLanes);
  const C c = C(exponent_scale(in.scale));
  for (int64_t key = t.range->begin; key < t.range->end; key += kKeys) {
    const int64_t n = at_most(kKeys, round_up(t.range->end, kPad) - key);
    multiply<P, Into::kSet>({keys.k_rows + key * width, width, P::kPair}, n, {t.q, kLanes * P::kPair}, vectors,
                            ceil_div(in.head_dim, P::kPair), t.s, kLanes);
    for (int64_t j = 0; j < vectors * Vec<C>::kWidth; j += Vec<C>::kWidth) {
      t.range->cut(key, key + n) ? weigh_lanes<T, true>(t, j, n, key, c) : weigh_lanes<T, false>(t, j, n, key, c);
    }
    multiply<P, Into::kScaleAdd>({keys.v_steps + key * width, P::kPair, width * P::kPair}, width,
                                 {t.p, kLanes * P::kPair}, vectors, n / P::kPair, t.o, kLanes, t.softmax->factor);
  }
  store_tile(in, row, tile, t, to);
}
