// Products of a token step: a few rows of x with all rows of weights, which are streamed from memory once.
//
// Activations between kernels are in the compute type. Inputs of products are narrowed to T.
#pragma once

#include "kernels/product.h"
#include "kernels/shuffle.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

// Rows of x per pass over a row of weights: their sums take 8 registers.
constexpr int64_t kStreamedRows = 8;
// Rows of weights whose sums are reduced together. Reducing each one's sums across a register would take 40 cycles
// without prefetching: rows of 1152 bytes came at 15 GB/s, and at 22 when 16 are reduced together (one thread).
constexpr int64_t kStreamedBlock = 16;
// Prefetch weights ahead of the line at `at`.
//
// Zen 4: the hardware prefetcher stops at the end of a 4 KiB page. Halfway through each page this prefetches the
// first line of the next one, from where the hardware continues. Prefetching every line 4 KiB ahead is as fast
// where memory delivers 34 GB/s, and 23 % slower where it delivers 55 (two threads; the same machine, varying by
// the minute): each line then occupies two of the core's few miss buffers.
//
// Emerald Rapids, whose memory has a higher latency: with every line 4 KiB ahead, rows of 1152 bytes come at 33
// GB/s and rows of 3072 at 35. Prefetching the next page reaches 24.5 and 25.7, and a plain read 34 (two threads).
// 512 bytes ahead gain nothing, 1 KiB gains half, and 16 KiB no more.
ICAE_INLINE void prefetch_weights(const void* at) {
  constexpr uintptr_t kPage = 4096;
#if defined(ICAE_PREFETCH_EVERY_LINE)
  __builtin_prefetch(static_cast<const char*>(at) + kPage, 0, 2);
#else
  constexpr uintptr_t kLine = 64;
  if ((reinterpret_cast<uintptr_t>(at) & (kPage - kLine)) == kPage / 2) {
    __builtin_prefetch(static_cast<const char*>(at) + kPage / 2, 0, 2);
  }
#endif
}

// Products of `columns` rows of weights with `rows` rows of x, as sums that are still spread over a vector. With
// one row of weights and one or two of x there are two chains, because a single one would wait for its own latency.
// With many rows of x there are two rows of weights, so that each x is loaded half as often.
template <class T, int rows, int columns>
struct StreamedTile {
  using C = typename Elem<T>::C;
#if defined(ICAE_AVX512)
  static constexpr bool kPairs = sizeof(T) == 2;
#else
  static constexpr bool kPairs = false;
#endif
  static constexpr int kChains = rows * columns <= 2 ? 2 : 1;
  static constexpr int kStep = kPairs ? 32 : Vec<C>::kWidth;  // elements per vector operation
  V<C> sums[rows][columns][kChains] = {};

  template <bool whole>
  ICAE_FORCED void step(const T* x, int64_t x_row, const T* w, int64_t w_row, int chain, int64_t n) {
#if defined(ICAE_AVX512)
    if constexpr (kPairs) {
      const int64_t bytes = whole ? 64 : n * 2;
      __m512bh weights[columns];
#pragma GCC unroll 2
      for (int c = 0; c < columns; ++c) weights[c] = (__m512bh)load_bytes(w + c * w_row, bytes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const __m512bh part = (__m512bh)load_bytes(x + r * x_row, bytes);
#pragma GCC unroll 2
        for (int c = 0; c < columns; ++c) {
          sums[r][c][chain] = _mm512_dpbf16_ps(sums[r][c][chain], weights[c], part);
        }
      }
      return;
    }
#endif
    V<C> weights[columns];
#pragma GCC unroll 2
    for (int c = 0; c < columns; ++c) weights[c] = whole ? load(w + c * w_row) : load_n(w + c * w_row, n);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V<C> part = whole ? load(x + r * x_row) : load_n(x + r * x_row, n);
#pragma GCC unroll 2
      for (int c = 0; c < columns; ++c) sums[r][c][chain] += weights[c] * part;
    }
  }

  // `to` is (rows, kStreamedBlock) vectors.
  ICAE_FORCED void run(const T* x, int64_t x_row, const T* w, int64_t w_row, int64_t k, V<C>* to) {
    int64_t d = 0;
    for (; d + kChains * kStep <= k; d += kChains * kStep) {
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain) {
        const T* part = w + d + chain * kStep;
#pragma GCC unroll 2
        for (int c = 0; c < columns; ++c) {
          prefetch_weights(part + c * w_row);
        }
        step<true>(x + d + chain * kStep, x_row, part, w_row, chain, kStep);
      }
    }
    for (; d < k; d += kStep) step<false>(x + d, x_row, w + d, w_row, 0, at_most(kStep, k - d));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < columns; ++c) {
        const auto& sum = sums[r][c];
        store(reinterpret_cast<C*>(to + r * kStreamedBlock + c), kChains == 2 ? sum[0] + sum[kChains - 1] : sum[0]);
      }
    }
  }
};

// One or two rows of weights with up to kStreamedRows rows of x.
template <class T, int columns>
static inline void streamed_columns(const T* x, int64_t x_row, int64_t rows, const T* w, int64_t w_row, int64_t k,
                                    V<typename Elem<T>::C>* to) {
  const auto part = [&](int64_t r) { return x + r * x_row; };
  const auto out = [&](int64_t r) { return to + r * kStreamedBlock; };
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) StreamedTile<T, 8, columns>().run(part(r), x_row, w, w_row, k, out(r));
  for (; r + 4 <= rows; r += 4) StreamedTile<T, 4, columns>().run(part(r), x_row, w, w_row, k, out(r));
  for (; r + 2 <= rows; r += 2) StreamedTile<T, 2, columns>().run(part(r), x_row, w, w_row, k, out(r));
  for (; r < rows; ++r) StreamedTile<T, 1, columns>().run(part(r), x_row, w, w_row, k, out(r));
}

// Sums of up to kStreamedBlock rows of weights with up to kStreamedRows rows of x. May write all kStreamedBlock
// elements of each row of `to`.
template <class T>
static inline void streamed_block(const T* x, int64_t x_row, int64_t rows, const T* w, int64_t w_row, int64_t n,
                                  int64_t k, typename Elem<T>::C* to, int64_t to_row) {
  using C = typename Elem<T>::C;
  V<C> spread[kStreamedRows * kStreamedBlock];
  int64_t i = 0;
  if (rows > 4) {
    for (; i + 2 <= n; i += 2) streamed_columns<T, 2>(x, x_row, rows, w + i * w_row, w_row, k, spread + i);
  }
  for (; i < n; ++i) streamed_columns<T, 1>(x, x_row, rows, w + i * w_row, w_row, k, spread + i);
  for (int64_t r = 0; r < rows; ++r, to += to_row) {
    const V<C>* row = spread + r * kStreamedBlock;
#if defined(ICAE_AVX512)
    if constexpr (sizeof(C) == 4) {
      V<float> each[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) each[i] = i < n ? row[i] : V<float>{};
      store(to, sum_each(each));
      continue;
    }
#endif
    for (int64_t i = 0; i < n; ++i) to[i] = sum<C>(row[i]);
  }
}

// x W^T + bias for `rows` rows from `row` on and `n` rows of weights from `first` on.
template <class T>
static inline void streamed_sums(const StreamedProduct& p, int64_t row, int64_t rows, int64_t first, int64_t n,
                                 typename Elem<T>::C* to, int64_t to_row) {
  const T *x = static_cast<const T*>(p.x) + row * p.k, *bias = static_cast<const T*>(p.bias);
  for (int64_t i = 0; i < n; i += kStreamedBlock) {
    streamed_block<T>(x, p.k, rows, static_cast<const T*>(p.w) + (first + i) * p.w_row, p.w_row,
                      at_most(kStreamedBlock, n - i), p.k, to + i, to_row);
  }
  if (bias == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) to[r * to_row + i] += to_compute(bias[first + i]);
  }
}

// silu(gate) * up
template <class C>
ICAE_INLINE V<C> gated(V<C> gate, V<C> up) {
  return gate * up / (set1(C(1)) + exp2<C, Elem<C>::kExpDegree>(gate * set1(C(-1.4426950408889634))));
}

// y = silu(gate) * up for outputs [begin, end), alternating between a run of gate's rows and one of up's.
template <class T>
static void streamed_swiglu(const StreamedProduct& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  // Every switch to other rows restarts the hardware prefetcher: with runs of 16 rows of 1152 bytes the product
  // took 3 to 5 % longer.
  constexpr int64_t kRun = 4 * kStreamedBlock;
  C gates[kStreamedRows * kRun], ups[kStreamedRows * kRun];
  for (int64_t row = 0; row < p.rows; row += kStreamedRows) {
    const int64_t rows = at_most(kStreamedRows, p.rows - row);
    for (int64_t column = begin; column < end; column += kRun) {
      const int64_t n = at_most(kRun, end - column);
      streamed_sums<T>(p, row, rows, column, n, gates, kRun);
      streamed_sums<T>(p, row, rows, p.columns / 2 + column, n, ups, kRun);
      for (int64_t r = 0; r < rows; ++r) {
        T* y = static_cast<T*>(p.y) + (row + r) * p.y_row + column;
        for_vectors<Vec<C>::kWidth>(n, [&](int64_t i, int64_t part) {
          store_up_to(y + i, gated<C>(load_up_to(gates + r * kRun + i, part), load_up_to(ups + r * kRun + i, part)),
                      part);
        });
      }
    }
  }
}

template <class T>
static void streamed_product(const StreamedProduct& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  if (p.epilogue == StreamedEpilogue::kSwiglu) return streamed_swiglu<T>(p, begin, end);
  C sums[kStreamedRows * kStreamedBlock];
  for (int64_t column = begin; column < end; column += kStreamedBlock) {
    const int64_t n = at_most(kStreamedBlock, end - column);
    for (int64_t row = 0; row < p.rows; row += kStreamedRows) {
      const int64_t rows = at_most(kStreamedRows, p.rows - row);
      streamed_sums<T>(p, row, rows, column, n, sums, kStreamedBlock);
      for (int64_t r = 0; r < rows; ++r) {
        const C* sum = sums + r * kStreamedBlock;
        C* y = static_cast<C*>(p.y) + (row + r) * p.y_row + column;
        for (int64_t i = 0; i < n; ++i) y[i] = p.epilogue == StreamedEpilogue::kAdd ? y[i] + sum[i] : sum[i];
      }
    }
  }
}

}  // namespace icae_fast::ICAE_UNIT
