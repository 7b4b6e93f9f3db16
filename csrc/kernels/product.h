// The matrix product of all attention kernels, and the packing of its operands.
//
//     C (rows, lanes) (+)= A (rows, steps) B (steps, lanes)
//
// A's elements are broadcast, B's and C's lie along the vector. A step is one element, or where ICAE_BF16_PAIRS is
// defined a pair of bf16 ones that `vdpbf16ps` multiplies and adds in fp32; `Product<T>::kPair` is its length.
// Operands come in two layouts:
//
//     rows    x[row][step]            A in K Q^T, where a pair is two neighbours of one row as they lie in memory
//     steps   x[step][column][pair]   B, and A in V^T P^T: pairs of two rows, interleaved
//
// For kPair = 1 both are the plain matrix in the compute type.

template <class T>
struct Product {
  using C = typename Elem<T>::C;
  using E = C;  // what operands are packed as
  using Operand = V<C>;
  static constexpr int kPair = 1;
  static constexpr bool kTiles = false;
  ICAE_INLINE Operand lanes(const E* p) { return load(p); }
  ICAE_INLINE Operand broadcast(const E* p) { return set1(*p); }
  ICAE_INLINE V<C> multiply_add(V<C> sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(ICAE_AVX512)
template <class E>
ICAE_INLINE __m512i broadcast_pair(const E* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
#endif

#if defined(ICAE_BF16_PAIRS)
template <>
struct Product<bf16> {
  using C = float;
  using E = bf16;
  using Operand = __m512i;
  static constexpr int kPair = 2;
#if defined(ICAE_AMX)
  static constexpr bool kTiles = true;  // large products go to tiles.h, and operands are packed for it
#else
  static constexpr bool kTiles = false;
#endif
  ICAE_INLINE Operand lanes(const E* p) { return _mm512_loadu_si512(p); }
  ICAE_INLINE Operand broadcast(const E* p) { return broadcast_pair(p); }
  ICAE_INLINE V<C> multiply_add(V<C> sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Rows and vectors of one register block: 8 x 3 accumulators, 3 operands and a broadcast fit 32 registers, 4 x 3
// fit 16.
#if defined(ICAE_AVX512) || defined(__aarch64__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif
constexpr int kBlockVectors = 3;
static_assert(kPad % kBlockRows == 0, "padding must fill the last block of rows");

enum class Into { kSet, kAdd };

template <class E>
struct Left {
  const E* data;
  int64_t row, step;
  int64_t block = kBlockRows * row;  // from one block of kBlockRows rows to the next
};

template <class E>
struct Right {
  const E* data;
  int64_t step;
};

// The product itself, into registers.
template <class P, int vectors>
using Block = V<typename P::C>[kBlockRows][vectors];

template <class P, int vectors>
ICAE_INLINE void multiply_into(Block<P, vectors>& sums, Left<typename P::E> a, Right<typename P::E> b,
                               int64_t steps) {
  constexpr int W = Vec<typename P::C>::kWidth;
  for (int64_t s = 0; s < steps; ++s) {
    typename P::Operand right[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) right[n] = P::lanes(b.data + s * b.step + n * W * P::kPair);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
      const typename P::Operand left = P::broadcast(a.data + m * a.row + s * a.step);
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sums[m][n] = P::multiply_add(sums[m][n], left, right[n]);
    }
  }
}

template <class P, int vectors>
ICAE_INLINE void load_block(Block<P, vectors>& x, const typename P::C* from, int64_t row) {
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) x[m][n] = load(from + m * row + n * Vec<typename P::C>::kWidth);
  }
}

template <class P, int vectors, Into into>
static inline void multiply_block(Left<typename P::E> a, Right<typename P::E> b, int64_t steps, typename P::C* c,
                                  int64_t c_row) {
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  Block<P, vectors> sums = {};
  multiply_into<P, vectors>(sums, a, b, steps);
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      C* p = c + m * c_row + n * W;
      if (into == Into::kAdd) sums[m][n] += load(p);
      store(p, sums[m][n]);
    }
  }
}

// The widths of the blocks that `vectors` vectors are cut into: 4 as 2 + 2, since a block of one starves the FMAs.
// Calls f(first vector, width).
template <class F>
ICAE_INLINE void in_blocks(int64_t vectors, F f) {
  for (int64_t groups = ceil_div(vectors, kBlockVectors), n = 0; groups > 0; --groups) {
    const int64_t width = ceil_div(vectors - n, groups);
    f(n, width);
    n += width;
  }
}

// `rows` is a multiple of kBlockRows. Tiles want A by rows, and multiples of kTileDepth of rows and of elements.
template <class P, Into into>
static inline void multiply(Left<typename P::E> a, int64_t rows, Right<typename P::E> b, int64_t vectors,
                            int64_t steps, typename P::C* c, int64_t c_row) {
  constexpr int W = Vec<typename P::C>::kWidth;
  if constexpr (P::kTiles) {
    return multiply_tiles(a.data, a.row, rows, b.data, b.step / P::kPair, vectors * W, steps * P::kPair,
                          into == Into::kAdd, c, c_row);
  }
  in_blocks(vectors, [&](int64_t n, int64_t width) {
    const Right<typename P::E> right{b.data + n * W * P::kPair, b.step};
    for (int64_t m = 0; m < rows; m += kBlockRows) {
      const Left<typename P::E> left{a.data + m / kBlockRows * a.block, a.row, a.step};
      auto* out = c + m * c_row + n * W;
      if (width == 3) {
        multiply_block<P, 3, into>(left, right, steps, out, c_row);
      } else if (width == 2) {
        multiply_block<P, 2, into>(left, right, steps, out, c_row);
      } else {
        multiply_block<P, 1, into>(left, right, steps, out, c_row);
      }
    }
  });
}

// ---- packing -------------------------------------------------------------------------------------------------

#if defined(ICAE_AVX512)
// The 16 x 16 transpose of 32-bit elements, by interleaving within and then across 128-bit parts.
ICAE_INLINE void transpose(__m512i (&x)[16]) {
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88),
                  b = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd),
                  d = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// Up to 64 bytes, the others 0.
ICAE_INLINE __m512i load_bytes(const void* p, int64_t bytes) {
  if (bytes >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}

ICAE_INLINE void store_bytes(void* p, __m512i v, int64_t bytes) {
  if (bytes >= 64) return _mm512_storeu_si512(p, v);
  _mm512_mask_storeu_epi8(p, (uint64_t{1} << bytes) - 1, v);
}

// Pairs of bf16 as two vectors of fp32: the first of each, and the second.
ICAE_INLINE V<float> first_of_pairs(__m512i pairs) { return (V<float>)_mm512_slli_epi32(pairs, 16); }
ICAE_INLINE V<float> second_of_pairs(__m512i pairs) {
  return (V<float>)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000)));
}

// The order in which the low halves of two vectors of bf16 are interleaved.
ICAE_INLINE __m512i low_pairs() {
  return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                          35, 3, 34, 2, 33, 1, 32, 0);
}

// Two rows of bf16 interleaved: f(column, up to 16 pairs as bytes) for every 16 columns.
template <class F>
ICAE_INLINE void interleave(const bf16* even, const bf16* odd, int64_t dim, F f) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < dim; d += 32) {
    const int64_t bytes = (dim - d) * 2;
    const __m512i a = load_bytes(even + d, bytes);
    const __m512i b = odd == nullptr ? _mm512_setzero_si512() : load_bytes(odd + d, bytes);
    f(d, _mm512_permutex2var_epi16(a, low, b));
    if (bytes > 32) f(d + 16, _mm512_permutex2var_epi16(a, high, b));
  }
}
#endif

ICAE_INLINE void convert(const float* from, float* to) { *to = *from; }
ICAE_INLINE void convert(const double* from, double* to) { *to = *from; }
ICAE_INLINE void convert(const bf16* from, bf16* to) { *to = *from; }
ICAE_INLINE void convert(const bf16* from, float* to) { *to = to_compute(*from); }

template <class T, class E>
ICAE_INLINE void convert_row(const T* from, int64_t n, E* to) {
#if defined(ICAE_AVX512)
  if constexpr (sizeof(T) == 2 && sizeof(E) == 4) {
    return in_parts<16>(n, [&](int64_t d, int64_t part) { put(to + d, get(from + d, part), part); });
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

// n rows in the layout `rows`, each one filled up with zeros to `width`, and zero rows up to `padded`.
template <class T, class E>
static inline void pack_rows(const T* from, int64_t from_row, int64_t n, int64_t dim, E* to, int64_t width,
                             int64_t padded) {
  for (int64_t r = 0; r < n; ++r) {
    convert_row(from + r * from_row, dim, to + r * width);
    if (width > dim) clear(to + r * width + dim, width - dim);
  }
  clear(to + n * width, (padded - n) * width);
}

// The same rows in the layout `steps`. `row(r)` is where row r begins; `padded` is a multiple of the pair.
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

// Rows `first` to `last` of n rows transposed, as A of a product by tiles: pieces of kColumnTile columns, (width,
// columns) by rows each, with zeros up to `width` rows and `padded` columns.
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
// Rows `first` to `last` of X^T in blocks of kBlockRows columns of X: (width / kBlockRows, padded / 2, kBlockRows,
// 2). One block after the other is multiplied, and so reads its part of the first-level cache from end to end.
template <class Row>
static inline void pack_column_blocks(Row row, int64_t first, int64_t last, int64_t n, int64_t dim, bf16* to,
                                      int64_t width, int64_t padded) {
  static_assert(kBlockRows == 8, "a vector of pairs is two blocks");
  const int64_t block = kBlockRows * padded;
  for (int64_t r = first; r < last; r += 2) {
    bf16* const step = to + r * kBlockRows;
    const auto put = [&](int64_t d, __m512i pairs) {
      bf16* const out = step + d / kBlockRows * block;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(pairs));
      if (d + kBlockRows < width) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + block), _mm512_extracti64x4_epi64(pairs, 1));
      }
    };
    if (r < n) {
      interleave(row(r), r + 1 < n ? row(r + 1) : nullptr, dim, put);
    } else {
      for (int64_t d = 0; d < width; d += 2 * kBlockRows) put(d, _mm512_setzero_si512());
    }
  }
}
#endif

// B = X^T: lane l of step s holds row(l)'s elements of that step. Lanes from n to kLanes are zero. A `negative` B
// is -X^T.
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

// Zeros in B's steps from `dim` up to `width`.
template <class P>
ICAE_INLINE void clear_past(typename P::E* b, int64_t dim, int64_t width) {
  const int64_t used = round_up(dim, P::kPair);
  clear(b + used * kLanes, (width - used) * kLanes);
}
