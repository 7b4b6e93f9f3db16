// Register tiles of the bf16 GEMM: some rows of x times one panel, then the epilogue.
#pragma once

#include "kernels/gemm/epilogue.h"
#include "kernels/gemm/panel.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

#if defined(ICAE_AVX512)

// Prefetches the rows of x that are widened next, every few steps of the current products. Each call reads them
// anew from the third-level cache or memory, and waiting for them took a tenth of the time (T 2560, k 576, N 960).
// Prefetching all of a tile's rows at once was as slow, because the prefetches waited for one another.
struct RowPrefetch {
  static constexpr int64_t kSteps = 8;
  const char* at = nullptr;
  int64_t each = 0;

  // Spread n rows from `row` on over `tiles` products.
  RowPrefetch(const GemmTerm& term, int64_t row, int64_t n, int64_t tiles) {
    if (!kWidens || term.x_transposed || n <= 0 || term.k == 0) return;
    const int64_t row_bytes = term.x_row * static_cast<int64_t>(sizeof(bf16));
    at = static_cast<const char*>(term.x) + row * row_bytes;
    each = ceil_div(kSteps * n * row_bytes, tiles * term.k);
  }

  ICAE_FORCED void issue() {
    __builtin_prefetch(at);
    at += each;
  }
};

template <int height>
using Sums = V<float>[height][2];

template <int height>
ICAE_INLINE void accumulate(const GemmOperand* x, int64_t x_row, const GemmOperand* panel, int64_t k,
                            Sums<height>& sums, RowPrefetch& prefetch) {
  using P = GemmProduct;
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    const P::Operand w[2] = {P::lanes(panel), P::lanes(panel + kHalf * P::kPair)};
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
      const P::Operand each = P::broadcast(x + r * x_row + d);
      sums[r][0] = P::multiply_add(sums[r][0], each, w[0]);
      sums[r][1] = P::multiply_add(sums[r][1], each, w[1]);
    }
    panel += kPanelStep;
  };
  int64_t d = 0;
  for (; kWidens && d + prefetch.kSteps <= k; d += prefetch.kSteps) {
    prefetch.issue();
#pragma GCC unroll 8
    for (int i = 0; i < prefetch.kSteps; ++i) step(d + i);  // a loop around the steps cost 7 %
  }
  for (; d < k; d += P::kPair) step(d);
}

#if defined(ICAE_AMX)

// Rows of the next tile, if `left` rows are left.
static inline int64_t rows_of_tile(int64_t left) { return at_least(kRowStep, left / kRowStep * kRowStep); }

template <GemmEpilogue epilogue, bool full>
static inline void epilogue_rows(const Gemm& g, const Halves& h, const float* sums, int64_t row, int64_t rows) {
  V<float> bias[2] = {};
  for (int i = 0; i < 2 && g.bias != nullptr; ++i) {
    bias[i] = load_n(static_cast<const bf16*>(g.bias) + h.column[i], h.n[i]);
  }
  const int64_t d = epilogue == GemmEpilogue::kRope ? h.column[0] % g.head_dim : 0;
  for (int64_t r = 0; r < rows; ++r, sums += 2 * kHalf) {
    epilogue_row<epilogue, full>(g, h, d, row + r, load(sums) + bias[0], load(sums + kHalf) + bias[1]);
  }
}

template <GemmEpilogue epilogue>
static void gemm_tile(const Gemm& g, const Halves& h, const GemmOperand* const (&x)[2], const int64_t (&x_row)[2],
                      const GemmOperand* panel, int64_t row, int64_t rows, int64_t tile_rows, RowPrefetch&) {
  alignas(64) float sums[kMostRows * 2 * kHalf];  // stays in the first-level cache
  for (int64_t i = 0; i < g.n_terms; ++i) {
    const int64_t k = padded_k(g.terms[i]);
    multiply_tiles(x[i], x_row[i], tile_rows, panel, 2 * kHalf, 2 * kHalf, k, i > 0, sums, 2 * kHalf);
    panel += panel_size(g.terms[i]);
  }
  h.n[0] == kHalf&& h.n[1] == kHalf ? epilogue_rows<epilogue, true>(g, h, sums, row, rows)
                                    : epilogue_rows<epilogue, false>(g, h, sums, row, rows);
}

#else

// The same: kTileRows, or fewer in steps of 4.
static inline int64_t rows_of_tile(int64_t left) { return left > 8 ? 12 : left > 4 ? 8 : 4; }

template <GemmEpilogue epilogue, int height>
static void gemm_tile_of(const Gemm& g, const Halves& h, const GemmOperand* const (&x)[2],
                         const int64_t (&x_row)[2], const GemmOperand* panel, int64_t row, int64_t rows,
                         RowPrefetch& prefetch) {
  Sums<height> sums;
  V<float> bias[2] = {};
  for (int i = 0; i < 2 && g.bias != nullptr; ++i) {
    bias[i] = load_n(static_cast<const bf16*>(g.bias) + h.column[i], h.n[i]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < height; ++r) {
    sums[r][0] = bias[0];
    sums[r][1] = bias[1];
  }
  accumulate<height>(x[0], x_row[0], panel, g.terms[0].k, sums, prefetch);
  if (g.n_terms == 2)
    accumulate<height>(x[1], x_row[1], panel + panel_size(g.terms[0]), g.terms[1].k, sums, prefetch);
  const int64_t d = epilogue == GemmEpilogue::kRope ? h.column[0] % g.head_dim : 0;
  if (rows == height && h.n[0] == kHalf && h.n[1] == kHalf) {
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) epilogue_row<epilogue, true>(g, h, d, row + r, sums[r][0], sums[r][1]);
  } else {
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
      if (r < rows) epilogue_row<epilogue, false>(g, h, d, row + r, sums[r][0], sums[r][1]);
    }
  }
}

template <GemmEpilogue epilogue>
static void gemm_tile(const Gemm& g, const Halves& h, const GemmOperand* const (&x)[2], const int64_t (&x_row)[2],
                      const GemmOperand* panel, int64_t row, int64_t rows, int64_t height, RowPrefetch& prefetch) {
  static_assert(kTileRows == 12, "rows_of_tile knows these heights");
  if (height == 12) {
    gemm_tile_of<epilogue, 12>(g, h, x, x_row, panel, row, rows, prefetch);
  } else if (height == 8) {
    gemm_tile_of<epilogue, 8>(g, h, x, x_row, panel, row, rows, prefetch);
  } else {
    gemm_tile_of<epilogue, 4>(g, h, x, x_row, panel, row, rows, prefetch);
  }
}

#endif

#endif

}  // namespace icae_fast::ICAE_UNIT
