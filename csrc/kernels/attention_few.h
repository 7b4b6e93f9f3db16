// Decoding: at most kFewLanes lanes, whose keys are read once where they lie, without packing. Scores come from dot
// products along the head.
//
// Where T is bf16 and `vdpbf16ps` is there, however slow, q and the weights stay narrow: at three lanes of 64 a key
// then takes a quarter of the cycles.
#if defined(ICAE_AVX512)
template <class T>
constexpr bool kFewPairs = sizeof(T) == 2;
#else
template <class T>
constexpr bool kFewPairs = false;
#endif

template <class T>
struct FewScratch {
  using C = typename Elem<T>::C;
  C *q, *o;     // (kFewLanes, width)
  C* s;         // (kFewLanes, kKeys)
  T* narrow_q;  // with pairs: (kFewLanes, width)
  T* narrow_s;  // with pairs: (kFewLanes, kKeys)
  static int64_t width(const AttentionInput& in) { return round_up(in.head_dim, 2 * Vec<C>::kWidth); }
  FewScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    const int64_t size = kFewLanes * width(in), narrow = kFewPairs<T> ? 1 : 0;
    q = arena.take<C>(size * (1 - narrow));
    o = arena.take<C>(size);
    s = arena.take<C>(kFewLanes * kKeys);
    narrow_q = arena.take<T>(size * narrow);
    narrow_s = arena.take<T>(kFewLanes * kKeys * narrow);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

#if defined(ICAE_AVX512)
// Keys and values are walked in the order in which they lie, 128 bytes of each at a time. In the order of
// registers, every other line first, the attention of SmolLM2's token steps took a tenth longer (Zen 4, two
// threads).

// Adds products of q with `rows` keys at k, of up to 16, over `vectors` vectors of the head; the last may be cut.
template <int vectors>
ICAE_FORCED void few_pair_dots(const bf16* q, const bf16* k, int64_t k_row, int64_t rows, int64_t left,
                               V<float>* dots) {
  __m512bh part[vectors];
#pragma GCC unroll 2
  for (int c = 0; c < vectors; ++c) part[c] = (__m512bh)_mm512_loadu_si512(q + 32 * c);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // past the last key, the last one once more
    const bf16* row = k + at_most(i, rows - 1) * k_row;
#pragma GCC unroll 2
    for (int c = 0; c < vectors; ++c) {
      const int64_t bytes = c + 1 < vectors ? 64 : (left - 32 * c) * static_cast<int64_t>(sizeof(bf16));
      dots[i] = _mm512_dpbf16_ps(dots[i], part[c], (__m512bh)load_bytes(row + 32 * c, bytes));
    }
  }
}

// Scores of n keys, 16 at a time, for all lanes.
static inline void few_pair_scores(const AttentionInput& in, const bf16* k, int64_t n, const FewScratch<bf16>& t,
                                   int64_t lanes) {
  for (int64_t key = 0; key < n; key += 16, k += 16 * in.k.row) {
    const int64_t rows = at_most(16, n - key);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const bf16* q = t.narrow_q + lane * t.width(in);
      V<float> dots[16] = {};
      int64_t d = 0;
      for (; d + 32 < in.head_dim; d += 64) {
        few_pair_dots<2>(q + d, k + d, in.k.row, rows, in.head_dim - d, dots);
      }
      if (d < in.head_dim) few_pair_dots<1>(q + d, k + d, in.k.row, rows, in.head_dim - d, dots);
      store(t.s + lane * kKeys + key, sum_each(dots));
    }
  }
}

// o = o factor + weights V for `lanes` lanes over `vectors` vectors of the head from d on, two keys at a time.
template <int lanes, int vectors>
ICAE_FORCED void few_pair_sums(const AttentionInput& in, const bf16* v, int64_t n, const FewScratch<bf16>& t,
                               int64_t lane, const float* factor, int64_t d) {
  const int64_t width = t.width(in);
  const __m512i low = low_pairs(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  V<float> sums[lanes][2 * vectors];
#pragma GCC unroll 4
  for (int l = 0; l < lanes; ++l) {
#pragma GCC unroll 4
    for (int c = 0; c < 2 * vectors; ++c) {
      sums[l][c] = load(t.o + (lane + l) * width + d + 16 * c) * factor[lane + l];
    }
  }
  for (int64_t key = 0; key < n; key += 2) {
    const bf16* row = v + key * in.v.row + d;
    __m512bh pairs[2 * vectors];
#pragma GCC unroll 2
    for (int c = 0; c < vectors; ++c) {
      const int64_t bytes = c + 1 < vectors ? 64 : (in.head_dim - d - 32 * c) * static_cast<int64_t>(sizeof(bf16));
      const __m512i even = load_bytes(row + 32 * c, bytes);
      const __m512i odd = key + 1 < n ? load_bytes(row + in.v.row + 32 * c, bytes) : _mm512_setzero_si512();
      pairs[2 * c] = (__m512bh)_mm512_permutex2var_epi16(even, low, odd);
      pairs[2 * c + 1] = (__m512bh)_mm512_permutex2var_epi16(even, high, odd);
    }
#pragma GCC unroll 4
    for (int l = 0; l < lanes; ++l) {
      const __m512bh weights = (__m512bh)broadcast_pair(t.narrow_s + (lane + l) * kKeys + key);
#pragma GCC unroll 4
      for (int c = 0; c < 2 * vectors; ++c) sums[l][c] = _mm512_dpbf16_ps(sums[l][c], weights, pairs[c]);
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < lanes; ++l) {
#pragma GCC unroll 4
    for (int c = 0; c < 2 * vectors; ++c) store(t.o + (lane + l) * width + d + 16 * c, sums[l][c]);
  }
}

template <int lanes>
static inline void few_pair_values(const AttentionInput& in, const bf16* v, int64_t n, const FewScratch<bf16>& t,
                                   int64_t lane, const float* factor) {
  int64_t d = 0;
  for (; d + 32 < in.head_dim; d += 64) few_pair_sums<lanes, 2>(in, v, n, t, lane, factor, d);
  if (d < in.head_dim) few_pair_sums<lanes, 1>(in, v, n, t, lane, factor, d);
}
#endif

template <class T>
ICAE_INLINE V<typename Elem<T>::C> load_part(const T* p, int64_t left) {
  return left >= Vec<typename Elem<T>::C>::kWidth ? load(p) : load_n(p, left);
}

// Scores of n keys for `lanes` lanes: each part of a key is read and widened once for all lanes.
template <class T, int lanes>
static inline void few_wide_scores(const AttentionInput& in, const T* k, int64_t n, const FewScratch<T>& t,
                                   int64_t lane) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = t.width(in);
  for (int64_t key = 0; key < n; ++key, k += in.k.row) {
    V<C> dots[lanes] = {};
    for (int64_t d = 0; d < in.head_dim; d += W) {
      const V<C> part = load_part(k + d, in.head_dim - d);
#pragma GCC unroll 4
      for (int l = 0; l < lanes; ++l) dots[l] += part * load(t.q + (lane + l) * width + d);
    }
#pragma GCC unroll 4
    for (int l = 0; l < lanes; ++l) t.s[(lane + l) * kKeys + key] = sum<C>(dots[l]);
  }
}

// o = o factor + weights V for `lanes` lanes.
template <class T, int lanes>
static inline void few_wide_values(const AttentionInput& in, const T* v, int64_t n, const FewScratch<T>& t,
                                   int64_t lane, const typename Elem<T>::C* factor) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = t.width(in);
  for (int64_t d = 0; d < in.head_dim; d += W) {
    V<C> sums[lanes];
    for (int l = 0; l < lanes; ++l) sums[l] = load(t.o + (lane + l) * width + d) * factor[lane + l];
    for (int64_t key = 0; key < n; ++key) {
      const V<C> part = load_part(v + key * in.v.row + d, in.head_dim - d);
#pragma GCC unroll 4
      for (int l = 0; l < lanes; ++l) sums[l] += part * t.s[(lane + l) * kKeys + key];
    }
    for (int l = 0; l < lanes; ++l) store(t.o + (lane + l) * width + d, sums[l]);
  }
}

// Asks for n keys or values, which are used once and so are never in a cache. Without it 8192 keys of SmolLM2's
// came at 14 GB/s in place of 18, and at 12 in place of 19 where heads lie between one another (Zen 4, two
// threads).
template <class T>
static inline void prefetch_keys(const T* x, int64_t row, int64_t n, int64_t dim) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(x + i * row + d, 0, 2);
  }
}

// Calls `f` with the lanes in groups of 4, 2 and 1, as template arguments.
template <class F4, class F2, class F1>
ICAE_INLINE void in_groups(int64_t lanes, F4 four, F2 two, F1 one) {
  int64_t l = 0;
  for (; l + 4 <= lanes; l += 4) four(l);
  for (; l + 2 <= lanes; l += 2) two(l);
  for (; l < lanes; ++l) one(l);
}

template <class T>
static inline void few_scores(const AttentionInput& in, const T* k, int64_t n, const FewScratch<T>& t,
                              int64_t lanes) {
#if defined(ICAE_AVX512)
  if constexpr (kFewPairs<T>) return few_pair_scores(in, k, n, t, lanes);
#endif
  in_groups(
      lanes, [&](int64_t l) { few_wide_scores<T, 4>(in, k, n, t, l); },
      [&](int64_t l) { few_wide_scores<T, 2>(in, k, n, t, l); },
      [&](int64_t l) { few_wide_scores<T, 1>(in, k, n, t, l); });
}

template <class T>
static inline void few_values(const AttentionInput& in, const T* v, int64_t n, const FewScratch<T>& t,
                              int64_t lanes, const typename Elem<T>::C* factor) {
#if defined(ICAE_AVX512)
  if constexpr (kFewPairs<T>) {
    for (int64_t l = 0; l < lanes; ++l) {
      const float* s = t.s + l * kKeys;
      for (int64_t key = 0; key < round_up(n, 16); key += 16) store(t.narrow_s + l * kKeys + key, load(s + key));
    }
    return in_groups(
        lanes, [&](int64_t l) { few_pair_values<4>(in, v, n, t, l, factor); },
        [&](int64_t l) { few_pair_values<2>(in, v, n, t, l, factor); },
        [&](int64_t l) { few_pair_values<1>(in, v, n, t, l, factor); });
  }
#endif
  in_groups(
      lanes, [&](int64_t l) { few_wide_values<T, 4>(in, v, n, t, l, factor); },
      [&](int64_t l) { few_wide_values<T, 2>(in, v, n, t, l, factor); },
      [&](int64_t l) { few_wide_values<T, 1>(in, v, n, t, l, factor); });
}

// Turns lane's scores of n keys into weights; gives the factor for what was summed before.
template <class T>
static inline typename Elem<T>::C few_weights(typename Elem<T>::C* s, int64_t n, typename Elem<T>::C c,
                                              typename Elem<T>::C* max, typename Elem<T>::C* sum_of) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth, degree = Elem<T>::kExpDegree;
  for (int64_t k = n; k < round_up(n, W); ++k) s[k] = -kInfinity<C>;
  V<C> top = set1(*max);
  for (int64_t k = 0; k < n; k += W) top = vmax(top, load(s + k));
  C highest = top[0];
  for (int i = 1; i < W; ++i) highest = top[i] > highest ? top[i] : highest;
  const C shift = highest == -kInfinity<C> ? C(0) : highest * c;
  V<C> total = {};
  for (int64_t k = 0; k < n; k += W) {
    const V<C> weights = exp2<C, degree>(load(s + k) * c - shift);
    total += weights;
    store(s + k, weights);
  }
  const C factor = exp2<C, degree>(set1(*max * c - shift))[0];
  *max = highest;
  *sum_of = *sum_of * factor + sum<C>(total);
  return factor;
}

template <class T>
static void forward_few(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, void* scratch,
                        const AttentionOutput& to) {
  using C = typename Elem<T>::C;
  const Tile tile(in, row, kv_head, 0);
  const FewScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const int64_t lanes = tile.lanes(), width = t.width(in), dim = in.head_dim;
  KeyRange<C> range;
  range.set(in, row, tile, lanes);
  C max[kFewLanes], total[kFewLanes] = {}, factor[kFewLanes];
  prefetch_keys(row_of<T>(in.k, row.k_begin + range.begin, kv_head), in.k.row,
                at_most(kKeys, range.end - range.begin), dim);
  clear(t.o, kFewLanes * width);
  kFewPairs<T> ? clear(t.narrow_q, kFewLanes * width) : clear(t.q, kFewLanes * width);
  for (int64_t l = 0; l < lanes; ++l) {
    const T* q = row_of<T>(in.q, row.q_begin + tile.position(l), tile.head(l));
    in_parts<Vec<C>::kWidth>(dim, [&](int64_t d, int64_t n) {
      const V<C> value = in.scale < 0 ? -get(q + d, n) : get(q + d, n);
      kFewPairs<T> ? put(t.narrow_q + l * width + d, value, n) : put(t.q + l * width + d, value, n);
    });
    max[l] = -kInfinity<C>;
  }
  const C c = C(exponent_scale(in.scale));
  for (int64_t key = range.begin; key < range.end; key += kKeys) {
    const int64_t n = at_most(kKeys, range.end - key);
    const T* k = row_of<T>(in.k, row.k_begin + key, kv_head);
    const T* v = row_of<T>(in.v, row.k_begin + key, kv_head);
    // While scores are computed, values come; while values are added up, the next keys.
    prefetch_keys(v, in.v.row, n, dim);
    few_scores(in, k, n, t, lanes);
    prefetch_keys(k + n * in.k.row, in.k.row, at_most(kKeys, range.end - key - n), dim);
    for (int64_t l = 0; l < lanes; ++l) {
      C* s = t.s + l * kKeys;
      for (int64_t i = 0; i < n && key + i < range.low[l]; ++i) s[i] = -kInfinity<C>;
      for (int64_t i = at_least(0, range.high[l] - key); i < n; ++i) s[i] = -kInfinity<C>;
      factor[l] = few_weights<T>(s, n, c, max + l, total + l);
    }
    few_values(in, v, n, t, lanes, factor);
  }
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t query = row.q_begin + tile.position(l) - to.first;
    static_cast<C*>(to.lse)[tile.head(l) * to.n + query] =
        total[l] == 0
            ? -kInfinity<C>
            : C(max[l] * (exponent_scale(in.scale) / 1.4426950408889634) + __builtin_log(double(total[l])));
    const C inverse = total[l] == 0 ? C(0) : 1 / total[l];
    const int64_t at = (query * in.q_heads + tile.head(l)) * dim;
    in_parts<Vec<C>::kWidth>(dim, [&](int64_t d, int64_t n) {
      const V<C> o = get(t.o + l * width + d, n) * inverse;
      to.partial ? put(static_cast<C*>(to.out) + at + d, o, n) : put(static_cast<T*>(to.out) + at + d, o, n);
    });
  }
}

template <class T>
static int64_t forward_scratch_bytes(const AttentionInput& in) {
  int64_t tile = 0, few = 0;
  ForwardScratch<T>(in, Arena{nullptr}, &tile);
  FewScratch<T>(in, Arena{nullptr}, &few);
  return at_least(tile, few);
}
