// Epilogues of the bf16 GEMM, on both halves of a row of sums in registers.
#pragma once

#include "kernels/gemm/panel.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

#if defined(ICAE_AVX512)

// Store both halves of a row of y. `full`: both have kHalf columns.
template <bool full>
ICAE_INLINE void store_half(bf16* to, V<float> v, int64_t n) {
  full ? store(to, v) : store_n(to, v, n);
}
template <bool full>
ICAE_INLINE void store_both(bf16* row, const Halves& h, V<float> a, V<float> b) {
  store_half<full>(row + h.column[0], a, h.n[0]);
  store_half<full>(row + h.column[1], b, h.n[1]);
}

template <GemmEpilogue epilogue, bool full>
ICAE_INLINE void epilogue_row(const Gemm& g, const Halves& h, int64_t d, int64_t row, V<float> a, V<float> b) {
  bf16* y = static_cast<bf16*>(g.y) + row * g.y_row;
  if constexpr (epilogue == GemmEpilogue::kStore && full) {  // the halves are adjacent
    _mm512_storeu_si512(y + h.column[0], (__m512i)_mm512_cvtne2ps_pbh(b * g.factor, a * g.factor));
  } else if constexpr (epilogue == GemmEpilogue::kStore) {
    store_both<full>(y, h, a * g.factor, b * g.factor);
  } else if constexpr (epilogue == GemmEpilogue::kRope) {
    const int64_t at = (g.table_rows == nullptr ? row : g.table_rows[row]) * (g.head_dim / 2) + d;
    const V<float> cos = full ? load(g.cos + at) : load_n(g.cos + at, h.n[0]);
    const V<float> sin = full ? load(g.sin + at) : load_n(g.sin + at, h.n[0]);
    store_both<full>(y, h, a * cos - b * sin, b * cos + a * sin);
  } else {
    if (g.kept != nullptr) store_both<full>(static_cast<bf16*>(g.kept) + row * g.columns, h, a, b);
    const V<float> sigmoid = _mm512_rcp14_ps(exp_of_negative<float, Elem<bf16>::kExpDegree>(a) + 1.0f);
    store_half<full>(y + h.column[0], a * sigmoid * b, h.n[0]);
  }
}

#endif

}  // namespace icae_fast::ICAE_UNIT
