// AVX-512 shuffles of packed operands: transpose, interleave, and masked loads and stores of bytes.
#pragma once

#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

#if defined(ICAE_AVX512)
// 16 x 16 transpose of 32-bit elements: interleave within 128-bit parts, then across them.
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

// Load up to 64 bytes and zero the others.
ICAE_INLINE __m512i load_bytes(const void* p, int64_t bytes) {
  if (bytes >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}

ICAE_INLINE void store_bytes(void* p, __m512i v, int64_t bytes) {
  if (bytes >= 64) return _mm512_storeu_si512(p, v);
  _mm512_mask_storeu_epi8(p, (uint64_t{1} << bytes) - 1, v);
}

// Widen the first, or the second, of each pair of bf16 to fp32.
ICAE_INLINE V<float> first_of_pairs(__m512i pairs) { return (V<float>)_mm512_slli_epi32(pairs, 16); }
ICAE_INLINE V<float> second_of_pairs(__m512i pairs) {
  return (V<float>)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000)));
}

// Permutation that interleaves the low halves of two vectors of bf16.
ICAE_INLINE __m512i low_pairs() {
  return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                          35, 3, 34, 2, 33, 1, 32, 0);
}

// Interleave two rows of bf16: f(column, up to 16 pairs as bytes) for every 16 columns.
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

}  // namespace icae_fast::ICAE_UNIT
