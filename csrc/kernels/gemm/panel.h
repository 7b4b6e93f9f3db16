// Operands of the bf16 GEMM: panels of packed weights, and blocks of rows of x.
#pragma once

#include "kernels/pack.h"
#include "kernels/product.h"
#include "kernels/shuffle.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

#if defined(ICAE_AVX512)

using GemmProduct = Product<bf16>;
using GemmOperand = GemmProduct::E;
constexpr bool kWidens = GemmProduct::kPair == 1;

// Elements of one step of a panel, which is (k / pair, 2 halves, kHalf, pair) for each term.
constexpr int64_t kPanelStep = 2 * kHalf * GemmProduct::kPair;
#if defined(ICAE_AMX)
constexpr int64_t kRowStep = 16, kMostRows = 128;
#else
constexpr int64_t kRowStep = kTileRows, kMostRows = 96;
#endif

// k of a panel, padded to pairs or to AMX tiles. If that pads k, x is copied and padded too.
static inline int64_t padded_k(const GemmTerm& term) {
  return round_up(term.k, GemmProduct::kTiles ? kTileDepth : 2);
}

static inline int64_t panel_size(const GemmTerm& term) { return padded_k(term) * 2 * kHalf; }

static inline int64_t panel_size(const Gemm& g) {
  int64_t size = 0;
  for (int64_t i = 0; i < g.n_terms; ++i) size += panel_size(g.terms[i]);
  return size;
}

// Rows of x that stay in the second-level cache while all panels of the call use them.
static inline int64_t block_rows(const Gemm& g) {
  constexpr int64_t kBlockBytes = 256 << 10;
  const int64_t rows = kBlockBytes / at_least(1, g.terms[0].k * static_cast<int64_t>(sizeof(GemmOperand)));
  return at_least(kRowStep, at_most(rows, kMostRows) / kRowStep * kRowStep);
}

static inline int64_t copy_stride(const GemmTerm& term) { return padded_k(term) + kRowGap; }

static int64_t gemm_scratch_bytes(const Gemm& g, int64_t panels) {
  int64_t elements = panels * panel_size(g);
  for (int64_t i = 0; i < g.n_terms; ++i) elements += block_rows(g) * copy_stride(g.terms[i]);
  return elements * sizeof(GemmOperand);
}

// Store pairs along k of 16 columns: one step of a panel, or two if operands are widened.
ICAE_INLINE void store_panel_pairs(GemmOperand* to, __m512i pairs) {
  if constexpr (kWidens) {
    store(to, first_of_pairs(pairs));
    store(to + kPanelStep, second_of_pairs(pairs));
  } else {
    _mm512_storeu_si512(to, pairs);
  }
}
constexpr int64_t kPairStep = kPanelStep * 2 / GemmProduct::kPair;

// Store the first n elements of a row of x.
ICAE_INLINE void store_row(GemmOperand* to, __m512i elements, int64_t n) {
  if constexpr (kWidens) {
    store_up_to(to, widen(_mm512_castsi512_si256(elements)), at_most(16, n));
    if (n > 16) store_up_to(to + 16, widen(_mm512_extracti64x4_epi64(elements, 1)), at_most(16, n - 16));
  } else {
    store_bytes(to, elements, n * sizeof(bf16));
  }
}

// Pack weights of up to 16 columns into one half of a panel, with zeros from k up to `padded`.
static inline void pack_half(const bf16* w, int64_t w_row, int64_t n, int64_t k, int64_t padded, GemmOperand* to) {
  for (int64_t d = 0; d < k; d += 32) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i) {
      x[i] = i < n ? load_bytes(w + i * w_row + d, (k - d) * sizeof(bf16)) : _mm512_setzero_si512();
    }
    transpose(x);
    const int64_t steps = at_most(16, (padded - d) / 2);
    for (int64_t s = 0; s < steps; ++s) store_panel_pairs(to + (d / 2 + s) * kPairStep, x[s]);
  }
}

// Rows d and d + 1 of a matrix of k rows as n pairs, with zeros past either end.
ICAE_INLINE __m512i pairs_of_rows(const bf16* from, int64_t row, int64_t d, int64_t n, int64_t k) {
  const auto lanes = [&](int64_t i) {
    if (i >= k) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, from + i * row));
  };
  return _mm512_or_si512(lanes(d), _mm512_slli_epi32(lanes(d + 1), 16));
}

// The same for transposed weights, (k, n).
static inline void pack_half_transposed(const bf16* w, int64_t w_row, int64_t n, int64_t k, int64_t padded,
                                        GemmOperand* to) {
  for (int64_t d = 0; d < padded; d += 2, to += kPairStep) {
    store_panel_pairs(to, pairs_of_rows(w, w_row, d, n, k));
  }
}

// Copy n rows of a transposed x, (k, n), into rows of k elements, with zeros from k up to `padded`.
static inline void copy_transposed(const bf16* x, int64_t x_row, int64_t n, int64_t k, int64_t padded,
                                   GemmOperand* to, int64_t to_row) {
  for (int64_t r = 0; r < n; r += 16) {
    const int64_t rows = at_most(16, n - r);
    for (int64_t d = 0; d < padded; d += 32) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) pairs[i] = pairs_of_rows(x + r, x_row, d + 2 * i, rows, k);
      transpose(pairs);
      for (int64_t i = 0; i < rows; ++i) {
        store_row(to + (r + i) * to_row + d, pairs[i], at_most(32, padded - d));
      }
    }
  }
}

static inline void pack_panel(const Gemm& g, int64_t panel, GemmOperand* to) {
  const Halves halves = g.halves(panel);
  for (int64_t i = 0; i < g.n_terms; ++i) {
    const GemmTerm& term = g.terms[i];
    for (int h = 0; h < 2; ++h) {
      const bf16* w = static_cast<const bf16*>(term.w) + halves.column[h] * (term.w_transposed ? 1 : term.w_row);
      const auto pack = term.w_transposed ? pack_half_transposed : pack_half;
      pack(w, term.w_row, halves.n[h], term.k, padded_k(term), to + h * kHalf * GemmProduct::kPair);
    }
    to += panel_size(term);
  }
}

static inline void copy_rows(const bf16* x, int64_t x_row, int64_t n, int64_t k, int64_t padded, GemmOperand* to,
                             int64_t to_row) {
  for (int64_t r = 0; r < n; ++r, to += to_row) {
    convert_row(x + r * x_row, k, to);
    clear(to + k, padded - k);
  }
}

// Rows of x for one block, in place or copied.
struct RowBlock {
  const GemmOperand* x[2];
  int64_t x_row[2];

  RowBlock(const Gemm& g, int64_t begin, int64_t n, GemmOperand* copy) {
    for (int64_t i = 0; i < g.n_terms; ++i) {
      const GemmTerm& term = g.terms[i];
      const bf16* const from = static_cast<const bf16*>(term.x) + begin * (term.x_transposed ? 1 : term.x_row);
      if constexpr (!kWidens) {
        x[i] = static_cast<const GemmOperand*>(static_cast<const void*>(from));  // the same type
        x_row[i] = term.x_row;
        if (padded_k(term) == term.k && n >= kRowStep && !term.x_transposed) continue;
      }
      x_row[i] = copy_stride(term);
      if (term.x_transposed) {
        copy_transposed(from, term.x_row, n, term.k, padded_k(term), copy, x_row[i]);
      } else {
        copy_rows(from, term.x_row, n, term.k, padded_k(term), copy, x_row[i]);
      }
      // A tile always computes kRowStep rows. Rows past the end are not stored.
      for (int64_t r = n; r < kRowStep; ++r) clear(copy + r * x_row[i], padded_k(term));
      x[i] = copy;
      copy += block_rows(g) * x_row[i];
    }
  }
};

#endif

}  // namespace icae_fast::ICAE_UNIT
