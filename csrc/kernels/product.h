// The matrix product of all attention kernels, and the packing of its operands.
//
//     C (rows, lanes) (+)= A (rows, steps) B (steps, lanes)
//
// A's elements are broadcast, B's and C's lie along the vector. A step is one element, or with AVX512-BF16 a pair
// of bf16 ones that `vdpbf16ps` multiplies and adds in fp32; `Product<T>::kPair` is its length. Operands come in
// two layouts:
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
  ICAE_INLINE Operand lanes(const E* p) { return load(p); }
  ICAE_INLINE Operand broadcast(const E* p) { return set1(*p); }
  ICAE_INLINE V<C> multiply_add(V<C> sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(ICAE_AVX512)
template <>
struct Product<bf16> {
  using C = float;
  using E = bf16;
  using Operand = __m512i;
  static constexpr int kPair = 2;
  ICAE_INLINE Operand lanes(const E* p) { return _mm512_loadu_si512(p); }
  ICAE_INLINE Operand broadcast(const E* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
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

enum class Into { kSet, kAdd, kScaleAdd };

template <class E>
struct Left {
  const E* data;
  int64_t row, step;
};

template <class E>
struct Right {
  const E* data;
  int64_t step;
};

template <class P, int vectors, Into into>
static inline void multiply_block(Left<typename P::E> a, Right<typename P::E> b, int64_t steps, typename P::C* c,
                                  int64_t c_row, const typename P::C* factor) {
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  V<C> sums[kBlockRows][vectors] = {};
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
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      C* p = c + m * c_row + n * W;
      if (into == Into::kAdd) sums[m][n] += load(p);
      if (into == Into::kScaleAdd) sums[m][n] += load(p) * load(factor + n * W);
      store(p, sums[m][n]);
    }
  }
}

// `rows` is a multiple of kBlockRows. With kScaleAdd, C's columns are first multiplied by `factor`.
template <class P, Into into>
static inline void multiply(Left<typename P::E> a, int64_t rows, Right<typename P::E> b, int64_t vectors,
                            int64_t steps, typename P::C* c, int64_t c_row, const typename P::C* factor = nullptr) {
  constexpr int W = Vec<typename P::C>::kWidth;
  for (int64_t groups = ceil_div(vectors, kBlockVectors), n = 0; groups > 0; --groups) {
    const int64_t width = ceil_div(vectors - n, groups);  // 4 vectors as 2 + 2: a block of one starves the FMAs
    const Right<typename P::E> right{b.data + n * W * P::kPair, b.step};
    const auto* scale = factor == nullptr ? nullptr : factor + n * W;
    for (int64_t m = 0; m < rows; m += kBlockRows) {
      const Left<typename P::E> left{a.data + m * a.row, a.row, a.step};
      auto* out = c + m * c_row + n * W;
      if (width == 3) {
        multiply_block<P, 3, into>(left, right, steps, out, c_row, scale);
      } else if (width == 2) {
        multiply_block<P, 2, into>(left, right, steps, out, c_row, scale);
      } else {
        multiply_block<P, 1, into>(left, right, steps, out, c_row, scale);
      }
    }
    n += width;
  }
}

// ---- packing -------------------------------------------------------------------------------------------------

ICAE_INLINE void convert(const float* from, float* to) { *to = *from; }
ICAE_INLINE void convert(const double* from, double* to) { *to = *from; }
ICAE_INLINE void convert(const bf16* from, bf16* to) { *to = *from; }
ICAE_INLINE void convert(const bf16* from, float* to) { *to = to_compute(*from); }

template <class E>
static inline void clear(E* p, int64_t n) {
  __builtin_memset(static_cast<void*>(p), 0, n * sizeof(E));
}

// n rows in the layout `rows`, each one filled up with zeros to `width`, and zero rows up to `padded`.
template <class T, class E>
static inline void pack_rows(const T* from, int64_t from_row, int64_t n, int64_t dim, E* to, int64_t width,
                             int64_t padded) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t d = 0; d < dim; ++d) convert(from + r * from_row + d, to + r * width + d);
    clear(to + r * width + dim, width - dim);
  }
  clear(to + n * width, (padded - n) * width);
}

// The same rows in the layout `steps`. `row(r)` is where row r begins; `padded` is a multiple of the pair.
template <class P, class T, class Row>
static inline void pack_steps(Row row, int64_t n, int64_t dim, typename P::E* to, int64_t width, int64_t padded) {
  constexpr int pair = P::kPair;
  if constexpr (pair == 2) {
    for (int64_t r = 0; r < n; r += 2, to += 2 * width) {
      const T* even = row(r);
      const T* odd = r + 1 < n ? row(r + 1) : nullptr;
      for (int64_t d = 0; d < dim && odd != nullptr; ++d) {
        const uint32_t both = even[d].bits | uint32_t{odd[d].bits} << 16;
        __builtin_memcpy(static_cast<void*>(to + 2 * d), &both, sizeof both);
      }
      for (int64_t d = 0; d < dim && odd == nullptr; ++d) {
        to[2 * d] = even[d];
        to[2 * d + 1] = T{0};
      }
      clear(to + 2 * dim, 2 * (width - dim));
    }
    clear(to, (padded - round_up(n, 2)) * width);
  } else {
    for (int64_t r = 0; r < n; ++r) {
      const T* from = row(r);
      for (int64_t d = 0; d < dim; ++d) convert(from + d, to + r * width + d);
      clear(to + r * width + dim, width - dim);
    }
    clear(to + n * width, (padded - n) * width);
  }
}

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
#endif

// B = X^T: lane l of step s holds row(l)'s elements of that step. Lanes from n to kLanes are zero. A `negative` B
// is -X^T.
template <class P, class T, class Row>
static inline void pack_transposed(Row row, int64_t n, int64_t dim, bool negative, typename P::E* to) {
  constexpr int pair = P::kPair;
#if defined(ICAE_AVX512)
  if constexpr (sizeof(typename P::E) * pair == 4) {
    const __m512i sign = _mm512_set1_epi32(!negative ? 0 : pair == 2 ? int32_t(0x80008000) : int32_t(0x80000000));
    constexpr int64_t per_vector = 16 * pair;
    for (int64_t l = 0; l < round_up(n, 16); l += 16) {
      for (int64_t d = 0; d < dim; d += per_vector) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) {
          x[i] = l + i < n ? load_bytes(row(l + i) + d, (dim - d) * sizeof(T)) : _mm512_setzero_si512();
        }
        transpose(x);
        const int64_t steps = at_most(16, ceil_div(dim - d, pair));
        for (int64_t s = 0; s < steps; ++s) {
          _mm512_storeu_si512(to + ((d / pair + s) * kLanes + l) * pair, _mm512_xor_si512(x[s], sign));
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
