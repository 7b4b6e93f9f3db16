// Decoding: at most kFewLanes lanes, whose keys are read once where they lie, without packing. Scores come from dot
// products along the head.
template <class T>
struct FewScratch {
  using C = typename Elem<T>::C;
  C *q, *o;  // (kFewLanes, width)
  C* s;      // (kFewLanes, kKeys)
  static int64_t width(const AttentionInput& in) { return round_up(in.head_dim, Vec<C>::kWidth); }
  FewScratch(const AttentionInput& in, Arena arena, int64_t* bytes = nullptr) {
    q = arena.take<C>(kFewLanes * width(in));
    o = arena.take<C>(kFewLanes * width(in));
    s = arena.take<C>(kFewLanes * kKeys);
    if (bytes != nullptr) *bytes = arena.used;
  }
};

template <class T>
ICAE_INLINE V<typename Elem<T>::C> load_part(const T* p, int64_t left) {
  return left >= Vec<typename Elem<T>::C>::kWidth ? load(p) : load_n(p, left);
}

// Scores of n keys for `lanes` lanes: each part of a key is read and widened once for all lanes.
template <class T, int lanes>
static inline void few_scores(const AttentionInput& in, const T* k, int64_t n, const FewScratch<T>& t,
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
static inline void few_values(const AttentionInput& in, const T* v, int64_t n, const FewScratch<T>& t, int64_t lane,
                              const typename Elem<T>::C* factor) {
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

// Calls `f` with the lanes in groups of 4, 2 and 1, as template arguments.
template <class F4, class F2, class F1>
ICAE_INLINE void in_groups(int64_t lanes, F4 four, F2 two, F1 one) {
  int64_t l = 0;
  for (; l + 4 <= lanes; l += 4) four(l);
  for (; l + 2 <= lanes; l += 2) two(l);
  for (; l < lanes; ++l) one(l);
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
  range.set(in, row, tile);
  C max[kFewLanes], total[kFewLanes] = {}, factor[kFewLanes];
  clear(t.q, kFewLanes * width);
  clear(t.o, kFewLanes * width);
  for (int64_t l = 0; l < lanes; ++l) {
    const T* q = row_of<T>(in.q, row.q_begin + tile.position(l), tile.head(l));
    for (int64_t d = 0; d < dim; ++d) t.q[l * width + d] = in.scale < 0 ? -to_compute(q[d]) : to_compute(q[d]);
    max[l] = -kInfinity<C>;
  }
  const C c = C(exponent_scale(in.scale));
  for (int64_t key = range.begin; key < range.end; key += kKeys) {
    const int64_t n = at_most(kKeys, range.end - key);
    const T* k = row_of<T>(in.k, row.k_begin + key, kv_head);
    const T* v = row_of<T>(in.v, row.k_begin + key, kv_head);
    in_groups(
        lanes, [&](int64_t l) { few_scores<T, 4>(in, k, n, t, l); },
        [&](int64_t l) { few_scores<T, 2>(in, k, n, t, l); }, [&](int64_t l) { few_scores<T, 1>(in, k, n, t, l); });
    for (int64_t l = 0; l < lanes; ++l) {
      C* s = t.s + l * kKeys;
      for (int64_t i = 0; i < n && key + i < range.low[l]; ++i) s[i] = -kInfinity<C>;
      for (int64_t i = at_least(0, range.high[l] - key); i < n; ++i) s[i] = -kInfinity<C>;
      factor[l] = few_weights<T>(s, n, c, max + l, total + l);
    }
    in_groups(
        lanes, [&](int64_t l) { few_values<T, 4>(in, v, n, t, l, factor); },
        [&](int64_t l) { few_values<T, 2>(in, v, n, t, l, factor); },
        [&](int64_t l) { few_values<T, 1>(in, v, n, t, l, factor); });
  }
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t query = row.q_begin + tile.position(l);
    static_cast<C*>(to.lse)[tile.head(l) * in.n_queries + query] =
        total[l] == 0
            ? -kInfinity<C>
            : C(max[l] * (exponent_scale(in.scale) / 1.4426950408889634) + __builtin_log(double(total[l])));
    const C inverse = total[l] == 0 ? C(0) : 1 / total[l];
    T* out = static_cast<T*>(to.out) + (query * in.q_heads + tile.head(l)) * dim;
    for (int64_t d = 0; d < dim; ++d) assign(out + d, t.o[l * width + d] * inverse);
  }
}

template <class T>
static int64_t forward_scratch_bytes(const AttentionInput& in) {
  int64_t tile = 0, few = 0;
  ForwardScratch<T>(in, Arena{nullptr}, &tile);
  FewScratch<T>(in, Arena{nullptr}, &few);
  return at_least(tile, few);
}
