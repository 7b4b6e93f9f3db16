// Operand types of V^T P^T, and that product in fp16.
//
// In fp16 (AVX512-FP16) the product takes half as many FMAs as in fp32. A step is a pair of keys. A register of
// sums holds the even and odd sums of 16 lanes. After at most kHalfKeys keys they are added, widened, and
// accumulated into O^T in fp32. So 64 terms are summed in fp16 and rounded to 11 bits each, while the output is
// rounded to 8.
//
// Powers of two scale both operands against overflow and underflow. Per dimension of kHalfKeys keys, the largest
// finite value becomes 2^kHalfTop to 2^(kHalfTop + 1). The others keep their 8 bits down to 2^-14 of it, and at
// most 2^-22 of it is lost. A weight of 1, that of a score equal to the shift, becomes 2^kHalfOne. Weights are up
// to 2^kSlack times that, keep their bits down to 2^-19, and are 0 from 2^-20 on.
#pragma once

#include "kernels/product.h"
#include "kernels/shuffle.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
struct ValueProduct {
  using E = typename Product<T>::E;
  static constexpr int kPair = Product<T>::kPair;
  static constexpr bool kHalf = false;
};

// The shift is raised when a weight would exceed 2^kSlack times that of a score equal to the shift.
#if defined(ICAE_FP16)
constexpr int kSlack = 5;  // 1 % slower than 8, for 3 more bits of the values
#else
constexpr int kSlack = 8;
#endif

#if defined(ICAE_FP16)
constexpr int kHalfTop = -3, kHalfOne = 5;
static_assert(kSlack + kHalfOne + kHalfTop + 1 + 7 <= 15, "128 of the largest products must not reach 2^16");
constexpr int64_t kHalfKeys = 128;
static_assert(kPackedKeys % kHalfKeys == 0, "a task packs keys of a scale of their own");

struct half {
  uint16_t bits;
};

template <>
struct ValueProduct<bf16> {
  using E = half;
  static constexpr int kPair = 2;
  static constexpr bool kHalf = true;
};

// Packed values of one (row, key/value head): (width / kBlockRows, padded / 2, kBlockRows, 2), as
// pack_column_blocks packs them. `scale` is the factor that undoes each dimension's scaling: (padded / kHalfKeys,
// width). Both fit in the place of fp32 values.
struct HalfValues {
  half* values;
  float* scale;
  int64_t width, padded;

  HalfValues(float* at, int64_t width, int64_t padded)
      : values(reinterpret_cast<half*>(at)), scale(at + padded * width / 2), width(width), padded(padded) {}

  half* block(int64_t d, int64_t key) const { return values + d * padded + key * kBlockRows; }
  float* scales(int64_t key) const { return scale + key / kHalfKeys * width; }
};

// Biased exponent of the largest finite element among rows, for 16 dimensions, clamped to what can be scaled back.
template <class Row>
ICAE_INLINE I<float> largest_exponent(Row row, int64_t first, int64_t last) {
  constexpr int kBack = kHalfTop + kHalfOne, kLeast = kBack > 0 ? 1 + kBack : 1,
                kMost = kBack < 0 ? 254 + kBack : 254;
  V<float> most{};
  for (int64_t r = first; r < last; ++r) {
    const V<float> x = row(r), size = x < 0.0f ? -x : x;
    most = size < set1(kInfinity<float>) && size > most ? size : most;
  }
  const I<float> found = (I<float>)most >> 23, least = I<float>{} + kLeast, largest = I<float>{} + kMost;
  return found < least ? least : found > largest ? largest : found;
}

// Pack rows [first, last) of n rows. `first` is a multiple of kHalfKeys.
static inline void pack_half_values(const bf16* from, int64_t stride, int64_t first, int64_t last, int64_t n,
                                    int64_t dim, const HalfValues& to) {
  for (int64_t key = first; key < last; key += kHalfKeys) {
    const int64_t end = at_most(key + kHalfKeys, last);
    for (int64_t d = 0; d < to.width; d += 16) {
      const int64_t part = at_least(0, at_most(16, dim - d));
      const auto row = [&](int64_t r) { return r < n ? load_up_to(from + r * stride + d, part) : V<float>{}; };
      const I<float> exponent = largest_exponent(row, key, at_most(end, n));
      store_up_to(to.scales(key) + d, (V<float>)((exponent - kHalfTop - kHalfOne) << 23),
                  at_most(16, to.width - d));
      const V<float> shift = __builtin_convertvector(127 + kHalfTop - exponent, V<float>);
      const auto scaled = [&](int64_t r) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtxps_ph(_mm512_scalef_ps(row(r), shift)));
      };
      half* out = to.block(d, key);
      for (int64_t r = key; r < end; r += 2, out += 2 * kBlockRows) {
        const __m512i pairs = _mm512_or_si512(scaled(r), _mm512_slli_epi32(scaled(r + 1), 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(pairs));
        if (d + kBlockRows < to.width) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kBlockRows * to.padded),
                              _mm512_extracti64x4_epi64(pairs, 1));
        }
      }
    }
  }
}

// Sum of each pair.
ICAE_INLINE V<float> sum_of_pairs(__m512h x) {
  const __m512h both = _mm512_add_ph(x, (__m512h)_mm512_srli_epi32((__m512i)x, 16));
  return (V<float>)_mm512_cvtxph_ps((__m256h)_mm512_cvtepi32_epi16((__m512i)both));
}

// O^T (+)= V^T P^T for kBlockRows dimensions and at most kHalfKeys keys. A step of p has kLanes pairs.
template <int vectors>
static inline void multiply_half(const half* v, const float* scale, const half* p, int64_t steps, bool add,
                                 float* o) {
  __m512h sums[kBlockRows][vectors] = {};
  for (int64_t s = 0; s < steps; ++s) {
    __m512h right[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) right[n] = (__m512h)_mm512_loadu_si512(p + s * 2 * kLanes + n * 32);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
      const __m512h left = (__m512h)broadcast_pair(v + (s * kBlockRows + m) * 2);
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sums[m][n] = _mm512_fmadd_ph(left, right[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const V<float> sum = sum_of_pairs(sums[m][n]);
      float* to = o + m * kLanes + n * 16;
      store(to, add ? load(to) + sum * scale[m] : sum * scale[m]);
    }
  }
}
#endif

}  // namespace icae_fast::ICAE_UNIT
