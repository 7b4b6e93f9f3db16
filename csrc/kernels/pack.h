// Packing of the operands of product.h into the layouts `rows` and `steps`.
#pragma once

#include "kernels/product.h"
#include "kernels/shuffle.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

ICAE_INLINE void convert(const float* from, float* to) { *to = *from; }
ICAE_INLINE void convert(const double* from, double* to) { *to = *from; }
ICAE_INLINE void convert(const bf16* from, bf16* to) { *to = *from; }
ICAE_INLINE void convert(const bf16* from, float* to) { *to = to_compute(*from); }

template <class T, class E>
ICAE_INLINE void convert_row(const T* from, int64_t n, E* to) {
#if defined(ICAE_AVX512)
  if constexpr (sizeof(T) == 2 && sizeof(E) == 4) {
    return for_vectors<16>(n,
                           [&](int64_t d, int64_t part) { store_up_to(to + d, load_up_to(from + d, part), part); });
  }
  if constexpr (sizeof(T) == sizeof(E)) {
    for (int64_t d = 0; d < n; d += 64 / sizeof(T)) {
      const int64_t bytes = (n - d) * sizeof(T);
      store_bytes(to + d, load_bytes(from + d, bytes), bytes);
    }
    return;
  }
#endif
  for (int64_t d = 0; d < n; ++d) convert(from + d, to + d);
}

template <class E>
static inline void clear(E* p, int64_t n) {
  __builtin_memset(static_cast<void*>(p), 0, n * sizeof(E));
}

// Pack n rows in the layout `rows`, each zero-padded to `width`, with zero rows up to `padded`.
template <class T, class E>
static inline void pack_rows(const T* from, int64_t from_row, int64_t n, int64_t dim, E* to, int64_t width,
                             int64_t padded) {
  for (int64_t r = 0; r < n; ++r) {
    convert_row(from + r * from_row, dim, to + r * width);
    if (width > dim) clear(to + r * width + dim, width - dim);
  }
  clear(to + n * width, (padded - n) * width);
}

// Pack the same rows in the layout `steps`. `row(r)` is where row r begins; `padded` is a multiple of the pair.
template <class P, class T, class Row>
static inline void pack_steps(Row row, int64_t n, int64_t dim, typename P::E* to, int64_t width, int64_t padded) {
  constexpr int pair = P::kPair;
  if constexpr (pair == 2) {
#if defined(ICAE_AVX512)
    for (int64_t r = 0; r < n; r += 2, to += 2 * width) {
      interleave(row(r), r + 1 < n ? row(r + 1) : nullptr, dim,
                 [&](int64_t d, __m512i pairs) { store_bytes(to + 2 * d, pairs, 4 * (dim - d)); });
      clear(to + 2 * dim, 2 * (width - dim));
    }
#endif
    clear(to, (padded - round_up(n, 2)) * width);
  } else {
    for (int64_t r = 0; r < n; ++r) {
      convert_row(row(r), dim, to + r * width);
      clear(to + r * width + dim, width - dim);
    }
    clear(to + n * width, (padded - n) * width);
  }
}

// Transpose rows [first, last) of n rows into operand A of a product by AMX tiles: pieces of kColumnTile columns,
// (width, columns) each and row-major, zero-padded to `width` rows and `padded` columns.
template <class Row>
static inline void pack_columns(Row row, int64_t first, int64_t last, int64_t n, int64_t dim, bf16* to,
                                int64_t width, int64_t padded) {
#if defined(ICAE_AVX512)
  for (int64_t r = first; r < last; r += 32) {
    const int64_t piece = r / kColumnTile * kColumnTile, columns = at_most(kColumnTile, padded - piece);
    for (int64_t d = 0; d < width; d += 16) {
      const int64_t bytes = at_least(0, at_most(16, dim - d)) * static_cast<int64_t>(sizeof(bf16));
      const auto part = [&](int64_t i) { return i < n ? load_bytes(row(i) + d, bytes) : _mm512_setzero_si512(); };
      __m512i x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = _mm512_permutex2var_epi16(part(r + 2 * i), low_pairs(), part(r + 2 * i + 1));
      transpose(x);
      bf16* out = to + piece * width + d * columns + r - piece;
      for (int i = 0; i < 16; ++i, out += columns) _mm512_storeu_si512(out, x[i]);
    }
  }
#endif
}

#if defined(ICAE_AVX512)
// Rows [first, last) of X^T in blocks of kBlockRows columns of X: (width / kBlockRows, padded / 2, kBlockRows, 2).
// Blocks are multiplied one after the other, so each is a contiguous part of the first-level cache.
template <class Row>
static inline void pack_column_blocks(Row row, int64_t first, int64_t last, int64_t n, int64_t dim, bf16* to,
                                      int64_t width, int64_t padded) {
  static_assert(kBlockRows == 8, "a vector of pairs is two blocks");
  const int64_t block = kBlockRows * padded;
  for (int64_t r = first; r < last; r += 2) {
    bf16* const step = to + r * kBlockRows;
    const auto store_pairs = [&](int64_t d, __m512i pairs) {
      bf16* const out = step + d / kBlockRows * block;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(pairs));
      if (d + kBlockRows < width) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + block), _mm512_extracti64x4_epi64(pairs, 1));
      }
    };
    if (r < n) {
      interleave(row(r), r + 1 < n ? row(r + 1) : nullptr, dim, store_pairs);
    } else {
      for (int64_t d = 0; d < width; d += 2 * kBlockRows) store_pairs(d, _mm512_setzero_si512());
    }
  }
}
#endif

// B = X^T, or -X^T if `negative`: lane l of step s holds that step's elements of row(l). Lanes from n to kLanes are
// zero.
template <class P, class T, class Row>
static inline void pack_transposed(Row row, int64_t n, int64_t dim, bool negative, typename P::E* to) {
  constexpr int pair = P::kPair;
#if defined(ICAE_AVX512)
  if constexpr (sizeof(typename P::E) * pair == 4) {
    constexpr bool pairs = sizeof(T) == 2, widens = pairs && pair == 1;
    const __m512i sign = _mm512_set1_epi32(!negative ? 0 : pairs ? int32_t(0x80008000) : int32_t(0x80000000));
    constexpr int64_t per_vector = pairs ? 32 : 16;
    for (int64_t l = 0; l < round_up(n, 16); l += 16) {
      for (int64_t d = 0; d < dim; d += per_vector) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) {
          x[i] = l + i < n ? load_bytes(row(l + i) + d, (dim - d) * sizeof(T)) : _mm512_setzero_si512();
        }
        transpose(x);
        const int64_t steps = at_most(16, ceil_div(dim - d, pairs ? 2 : 1));
        for (int64_t s = 0; s < steps; ++s) {
          const __m512i v = _mm512_xor_si512(x[s], sign);
          if constexpr (widens) {
            store(to + (d + 2 * s) * kLanes + l, first_of_pairs(v));
            if (d + 2 * s + 1 < dim) store(to + (d + 2 * s + 1) * kLanes + l, second_of_pairs(v));
          } else {
            _mm512_storeu_si512(to + ((d / pair + s) * kLanes + l) * pair, v);
          }
        }
      }
    }
    return;
  }
#endif
  if (n < kLanes || dim % pair != 0) clear(to, round_up(dim, pair) * kLanes);
  for (int64_t l = 0; l < n; ++l) {
    const T* from = row(l);
    for (int64_t d = 0; d < dim; ++d) {
      typename P::E* out = to + ((d / pair) * kLanes + l) * pair + d % pair;
      convert(from + d, out);
      if constexpr (pair == 1) *out = negative ? -*out : *out;
    }
  }
}

// Zero B's steps from `dim` up to `width`.
template <class P>
ICAE_INLINE void clear_past(typename P::E* b, int64_t dim, int64_t width) {
  const int64_t used = round_up(dim, P::kPair);
  clear(b + used * kLanes, (width - used) * kLanes);
}

}  // namespace icae_fast::ICAE_UNIT
