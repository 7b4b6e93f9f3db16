// Scores and weighted sums of values for a few lanes, with keys and values read in place.
#pragma once

#include "kernels/attention/layout.h"
#include "kernels/product.h"
#include "kernels/shuffle.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

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
// These walk keys and values in memory order, 128 bytes of each at a time. Register order, with every other line
// first, made the attention of SmolLM2's token steps a tenth slower (Zen 4, two threads).

// Add the products of q with up to 16 keys over `vectors` vectors of the head. The last vector may be partial.
template <int vectors>
ICAE_FORCED void few_pair_dots(const bf16* q, const bf16* k, int64_t k_row, int64_t rows, int64_t left,
                               V<float>* dots) {
  __m512bh part[vectors];
#pragma GCC unroll 2
  for (int c = 0; c < vectors; ++c) part[c] = (__m512bh)_mm512_loadu_si512(q + 32 * c);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // past the last key, the last one again
    const bf16* row = k + at_most(i, rows - 1) * k_row;
#pragma GCC unroll 2
    for (int c = 0; c < vectors; ++c) {
      const int64_t bytes = c + 1 < vectors ? 64 : (left - 32 * c) * static_cast<int64_t>(sizeof(bf16));
      dots[i] = _mm512_dpbf16_ps(dots[i], part[c], (__m512bh)load_bytes(row + 32 * c, bytes));
    }
  }
}

// Scores of n keys for all lanes, 16 keys at a time.
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

// o = o factor + weights V for `lanes` lanes and `vectors` vectors of the head from d on, two keys at a time.
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

// Scores of n keys for `lanes` lanes. Each part of a key is read and widened once for all lanes.
template <class T, int lanes>
static inline void few_wide_scores(const AttentionInput& in, const T* k, int64_t n, const FewScratch<T>& t,
                                   int64_t lane) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t width = t.width(in);
  for (int64_t key = 0; key < n; ++key, k += in.k.row) {
    V<C> dots[lanes] = {};
    for (int64_t d = 0; d < in.head_dim; d += W) {
      const V<C> part = load_at_most(k + d, in.head_dim - d);
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
      const V<C> part = load_at_most(v + key * in.v.row + d, in.head_dim - d);
#pragma GCC unroll 4
      for (int l = 0; l < lanes; ++l) sums[l] += part * t.s[(lane + l) * kKeys + key];
    }
    for (int l = 0; l < lanes; ++l) store(t.o + (lane + l) * width + d, sums[l]);
  }
}

}  // namespace icae_fast::ICAE_UNIT
