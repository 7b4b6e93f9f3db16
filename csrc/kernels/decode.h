// A token step's parts besides attention: products with a few rows, and passes over single rows.
//
// Activations between the parts are in the compute type; only what a product reads is narrowed to T.

// Rows of x that one pass over a row of weights serves: their sums take 8 registers.
constexpr int64_t kStreamedRows = 8;
// How far ahead weights are asked for. The hardware's own prefetching stops at every page of 4 KiB.
constexpr int64_t kAheadBytes = 2048;

// Sums of one row of weights with `rows` rows of x, `chains` sums each so that one need not wait for the other.
template <class T, int rows, int chains>
struct StreamedRow {
  using C = typename Elem<T>::C;
#if defined(ICAE_AVX512)
  static constexpr bool kPairs = sizeof(T) == 2;
#else
  static constexpr bool kPairs = false;
#endif
  static constexpr int kStep = kPairs ? 32 : Vec<C>::kWidth;  // elements of a vector's worth of work
  V<C> sums[rows][chains] = {};

  ICAE_FORCED void step(const T* x, int64_t x_row, const T* w, int chain, int64_t n) {
#if defined(ICAE_AVX512)
    if constexpr (kPairs) {
      const __m512bh weights = (__m512bh)load_bytes(w, n * 2);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sums[r][chain] = _mm512_dpbf16_ps(sums[r][chain], weights, (__m512bh)load_bytes(x + r * x_row, n * 2));
      }
      return;
    }
#endif
    const V<C> weights = n == kStep ? load(w) : load_n(w, n);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      sums[r][chain] += weights * (n == kStep ? load(x + r * x_row) : load_n(x + r * x_row, n));
    }
  }

  ICAE_FORCED void run(const T* x, int64_t x_row, const T* w, int64_t k, C* to) {
    int64_t d = 0;
    for (; d + chains * kStep <= k; d += chains * kStep) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + d + c * kStep) + kAheadBytes);
        step(x + d + c * kStep, x_row, w + d + c * kStep, c, kStep);
      }
    }
    for (; d < k; d += kStep) step(x + d, x_row, w + d, 0, at_most(kStep, k - d));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      V<C> total = sums[r][0];
#pragma GCC unroll 4
      for (int c = 1; c < chains; ++c) total += sums[r][c];
      to[r] = sum<C>(total);
    }
  }
};

// The products of one row of weights with up to kStreamedRows rows of x.
template <class T>
ICAE_INLINE void streamed_row(const T* x, int64_t x_row, int64_t rows, const T* w, int64_t k,
                              typename Elem<T>::C* to) {
  int64_t r = 0;
  if (rows == 1) return StreamedRow<T, 1, 4>().run(x, x_row, w, k, to);
  for (; r + 8 <= rows; r += 8) StreamedRow<T, 8, 1>().run(x + r * x_row, x_row, w, k, to + r);
  for (; r + 4 <= rows; r += 4) StreamedRow<T, 4, 1>().run(x + r * x_row, x_row, w, k, to + r);
  for (; r + 2 <= rows; r += 2) StreamedRow<T, 2, 2>().run(x + r * x_row, x_row, w, k, to + r);
  for (; r < rows; ++r) StreamedRow<T, 1, 4>().run(x + r * x_row, x_row, w, k, to + r);
}

template <class T>
static void streamed_product(const StreamedProduct& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  const T* x = static_cast<const T*>(p.x);
  const T* bias = static_cast<const T*>(p.bias);
  const auto product = [&](int64_t column, int64_t row, int64_t rows, C* to) {
    streamed_row<T>(x + row * p.k, p.k, rows, static_cast<const T*>(p.w) + column * p.w_row, p.k, to);
    for (int64_t r = 0; r < rows && bias != nullptr; ++r) to[r] += to_compute(bias[column]);
  };
  for (int64_t column = begin; column < end; ++column) {
    for (int64_t row = 0; row < p.rows; row += kStreamedRows) {
      const int64_t rows = at_most(kStreamedRows, p.rows - row);
      C sums[kStreamedRows], ups[kStreamedRows];
      product(column, row, rows, sums);
      if (p.after == After::kSwiglu) product(p.columns / 2 + column, row, rows, ups);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * p.y_row + column;
        if (p.after == After::kSwiglu) {
          const C s = sums[r] / (C(1) + exp2<C, Elem<C>::kExpDegree>(set1(sums[r] * C(-1.4426950408889634)))[0]);
          assign(static_cast<T*>(p.y) + at, s * ups[r]);
        } else {
          C* y = static_cast<C*>(p.y) + at;
          *y = p.after == After::kAdd ? *y + sums[r] : sums[r];
        }
      }
    }
  }
}

template <class T>
static void widen_row(const void* from, int64_t n, void* to) {
  for (int64_t i = 0; i < n; ++i) static_cast<typename Elem<T>::C*>(to)[i] = to_compute(static_cast<const T*>(from)[i]);
}

// y = x / rms(x) * weight, from the compute type to T. `weight` may be null.
template <class T>
static void norm_row(const void* from, const void* weight, double eps, int64_t n, void* to) {
  using C = typename Elem<T>::C;
  const C* x = static_cast<const C*>(from);
  const C inverse = inverse_rms(x, n, eps);
  in_parts<Vec<C>::kWidth>(n, [&](int64_t i, int64_t part) {
    put(static_cast<T*>(to) + i, get(x + i, part) * inverse * get(static_cast<const T*>(weight) + i, part), part);
  });
}

// One projected head: its norm, where `weight` is not null, then RoPE, where `cos` is not null.
template <class T>
static void turn_head(const void* from, const void* weight, double eps, const void* cos, const void* sin,
                      int64_t dim, void* to) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const C* y = static_cast<const C*>(from);
  T* out = static_cast<T*>(to);
  const T* scale = static_cast<const T*>(weight);
  if (cos == nullptr) return in_parts<W>(dim, [&](int64_t d, int64_t n) { put(out + d, get(y + d, n), n); });
  const C inverse = scale == nullptr ? C(1) : inverse_rms(y, dim, eps);
  const int64_t half = dim / 2;
  in_parts<W>(half, [&](int64_t d, int64_t n) {
    V<C> a = get(y + d, n), b = get(y + half + d, n);
    if (scale != nullptr) {
      a = a * inverse * get(scale + d, n);
      b = b * inverse * get(scale + half + d, n);
    }
    const V<C> c = get(static_cast<const C*>(cos) + d, n), s = get(static_cast<const C*>(sin) + d, n);
    put(out + d, a * c - b * s, n);
    put(out + half + d, b * c + a * s, n);
  });
}

// One head's output from `n` partial ones over different keys, each normalised, and their log-sum-exps:
// sum_i e^(lse_i - lse) out_i,  lse = log sum_i e^lse_i.
template <class T>
static void merge_head(const void* const* outs, const void* const* lses, int64_t n, int64_t dim, void* to) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  C highest = -kInfinity<C>, total = 0;
  const auto lse = [&](int64_t i) { return *static_cast<const C*>(lses[i]); };
  for (int64_t i = 0; i < n; ++i) highest = lse(i) > highest ? lse(i) : highest;
  const auto weight = [&](int64_t i) {
    return lse(i) == -kInfinity<C> ? C(0)
                                   : exp2<C, Elem<C>::kExpDegree>(set1((lse(i) - highest) * C(1.4426950408889634)))[0];
  };
  for (int64_t i = 0; i < n; ++i) total += weight(i);
  const C inverse = total == 0 ? C(0) : 1 / total;
  in_parts<W>(dim, [&](int64_t d, int64_t part) {
    V<C> sums = {};
    for (int64_t i = 0; i < n; ++i) sums += get(static_cast<const C*>(outs[i]) + d, part) * (weight(i) * inverse);
    put(static_cast<T*>(to) + d, sums, part);
  });
}
