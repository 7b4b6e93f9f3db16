// The matrix product of all attention kernels.
//
//     C (rows, lanes) (+)= A (rows, steps) B (steps, lanes)
//
// Elements of A are broadcast; B and C lie along the vectors. A step is one element. With ICAE_BF16_PAIRS it is a
// pair of bf16 elements, which `vdpbf16ps` multiplies and adds in fp32. `Product<T>::kPair` is its length. Operands
// have one of two layouts (pack.h):
//
//     rows    x[row][step]            A in K Q^T: a pair is two neighbours of one row, as in memory
//     steps   x[step][column][pair]   B, and A in V^T P^T: pairs of two rows, interleaved
//
// For kPair = 1 both are the plain matrix in the compute type.
#pragma once

#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
struct Product {
  using C = typename Elem<T>::C;
  using E = C;  // type of packed operands
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
  static constexpr bool kTiles = true;  // large products use tiles.h, and operands are packed for it
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

// Rows and vectors of one register block: 8 x 3 accumulators, 3 operands and a broadcast fit 32 registers; 4 x 3
// fit 16.
#if defined(ICAE_AVX512) || defined(__aarch64__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif
constexpr int kBlockVectors = 3;
static_assert(kPad % kBlockRows == 0, "padding must fill the last block of rows");

// Whether a product overwrites C or adds to it.
enum class Result { kOverwrite, kAccumulate };

// A, whose elements are broadcast.
template <class E>
struct OperandA {
  const E* data;
  int64_t row, step;
  int64_t block = kBlockRows * row;  // distance between blocks of kBlockRows rows
};

// B, whose elements lie along the vector.
template <class E>
struct OperandB {
  const E* data;
  int64_t step;
};

// Sums of one register block.
template <class P, int vectors>
using Block = V<typename P::C>[kBlockRows][vectors];

// sums += A B, in registers.
template <class P, int vectors>
ICAE_INLINE void multiply_into(Block<P, vectors>& sums, OperandA<typename P::E> a, OperandB<typename P::E> b,
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

// C (+)= A B for one register block.
template <class P, int vectors, Result result>
static inline void multiply_block(OperandA<typename P::E> a, OperandB<typename P::E> b, int64_t steps,
                                  typename P::C* c, int64_t c_row) {
  using C = typename P::C;
  constexpr int W = Vec<C>::kWidth;
  Block<P, vectors> sums = {};
  multiply_into<P, vectors>(sums, a, b, steps);
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      C* p = c + m * c_row + n * W;
      if (result == Result::kAccumulate) sums[m][n] += load(p);
      store(p, sums[m][n]);
    }
  }
}

// Cut `vectors` vectors into register blocks and call f(first vector, width) for each. 4 becomes 2 + 2, because a
// block of one vector starves the FMAs.
template <class F>
ICAE_INLINE void for_vector_blocks(int64_t vectors, F f) {
  for (int64_t groups = ceil_div(vectors, kBlockVectors), n = 0; groups > 0; --groups) {
    const int64_t width = ceil_div(vectors - n, groups);
    f(n, width);
    n += width;
  }
}

// `rows` is a multiple of kBlockRows. AMX tiles need A by rows, and multiples of kTileDepth rows and elements.
template <class P, Result result>
static inline void multiply(OperandA<typename P::E> a, int64_t rows, OperandB<typename P::E> b, int64_t vectors,
                            int64_t steps, typename P::C* c, int64_t c_row) {
  constexpr int W = Vec<typename P::C>::kWidth;
  if constexpr (P::kTiles) {
    return multiply_tiles(a.data, a.row, rows, b.data, b.step / P::kPair, vectors * W, steps * P::kPair,
                          result == Result::kAccumulate, c, c_row);
  }
  for_vector_blocks(vectors, [&](int64_t n, int64_t width) {
    const OperandB<typename P::E> right{b.data + n * W * P::kPair, b.step};
    for (int64_t m = 0; m < rows; m += kBlockRows) {
      const OperandA<typename P::E> left{a.data + m / kBlockRows * a.block, a.row, a.step};
      auto* out = c + m * c_row + n * W;
      if (width == 3) {
        multiply_block<P, 3, result>(left, right, steps, out, c_row);
      } else if (width == 2) {
        multiply_block<P, 2, result>(left, right, steps, out, c_row);
      } else {
        multiply_block<P, 1, result>(left, right, steps, out, c_row);
      }
    }
  });
}

}  // namespace icae_fast::ICAE_UNIT
