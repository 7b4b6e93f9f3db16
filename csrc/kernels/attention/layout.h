// Layout of packed keys and values.
//
// All matrices are transposed: a tile of scores is S^T, with keys as rows and lanes along the vectors. A lane is
// one (position, query head) pair of the row. Heads of one key/value head vary fastest, so K and V are read once
// for the whole GQA group. Maximum and sum over the keys are then vertical vector operations, and no score is
// reduced across a register.
#pragma once

#include "kernels/attention/half_values.h"
#include "kernels/pack.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

// Keys of a tile. S^T in fp32 takes 12 KiB of the 32 KiB of L1. With 96, 128 or 192 keys, times at 4 x 640 and 1 x
// 2560 tokens differed by less than 3 % (AVX-512, two threads).
constexpr int64_t kKeys = 64;
static_assert(kPackedKeys % kKeys == 0 && kPackedKeys % kColumnTile == 0, "a task packs whole tiles");

// Bump allocator over one allocation. With a null base it only counts bytes.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t n) {
    X* piece = base == nullptr ? nullptr : reinterpret_cast<X*>(base + used);
    used += round_up(n * static_cast<int64_t>(sizeof(X)), 64);
    return piece;
  }
};

// Packed keys and values of one (row, key/value head). The forward needs K in layout `rows` and V in layout `steps`
// (product.h); the backward also needs K in `steps` and V in `rows`. If a step is one element, the two layouts are
// the same matrix. AMX needs V^T and K^T by rows, not `steps`.
template <class T>
struct PackedKeys {
  using P = Product<T>;
  using E = typename P::E;
  E *k_rows, *v_steps, *k_steps, *v_rows;
  int64_t padded;

  static int64_t width(const AttentionInput& in) { return round_up(in.head_dim, P::kTiles ? kTileDepth : kPad); }
  static int matrices(bool backward) { return backward && P::kPair == 2 ? 3 : 2; }

  PackedKeys(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, bool backward, const void* base) {
    const int64_t matrix = in.packed_keys * width(in);
    const int64_t head = in.one_head_packed ? 0 : kv_head;
    E* first = static_cast<E*>(const_cast<void*>(base)) + head * matrices(backward) * matrix +
               row.packed_begin * width(in);
    k_rows = first;
    k_steps = P::kPair == 1 ? first : first + 2 * matrix;
    v_rows = v_steps = first + matrix;
    padded = row.padded_keys();
  }

#if defined(ICAE_FP16)
  HalfValues half_values(const AttentionInput& in) const { return {v_steps, width(in), padded}; }
#endif

  // V^T or K^T from `key` on.
  OperandA<E> columns(const AttentionInput& in, const E* steps, int64_t key) const {
    if constexpr (P::kTiles) {
      const int64_t piece = key / kColumnTile * kColumnTile;
      return {steps + piece * width(in) + key - piece, at_most(kColumnTile, padded - piece), P::kPair};
    }
    if constexpr (P::kPair == 2) {
      return {steps + key * kBlockRows, P::kPair, kBlockRows * P::kPair, kBlockRows * padded};
    }
    return {steps + key * width(in), P::kPair, width(in) * P::kPair};
  }
};

template <class T>
static int64_t packed_bytes(const AttentionInput& in, bool backward) {
  using K = PackedKeys<T>;
  return in.packed_heads() * K::matrices(backward) * in.packed_keys * K::width(in) * sizeof(typename K::E);
}

template <class T>
static const T* row_of(const Strided& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row + head * x.head;
}

// Pack keys and values from `first`, a multiple of kPackedKeys, to `last` or the end of the padded row.
template <class T>
static void pack_keys(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t first,
                      int64_t last, bool backward, void* packed) {
  using P = Product<T>;
  const PackedKeys<T> to(in, row, kv_head, backward, packed);
  const int64_t width = to.width(in), padded = row.padded_keys(), end = at_most(last, padded);
  const int64_t n = at_least(0, at_most(row.n_keys, end) - first);
  const T* k = row_of<T>(in.k, row.k_begin, kv_head);
  const T* v = row_of<T>(in.v, row.k_begin, kv_head);
  const auto by_steps = [&](const T* from, int64_t stride, typename P::E* out) {
    const auto row_at = [=](int64_t r) { return from + r * stride; };
    if constexpr (P::kTiles) {
      pack_columns(row_at, first, end, row.n_keys, in.head_dim, out, width, padded);
#if defined(ICAE_AVX512)
    } else if constexpr (P::kPair == 2) {
      pack_column_blocks(row_at, first, end, row.n_keys, in.head_dim, out, width, padded);
#endif
    } else {
      const auto part = [=](int64_t r) { return from + (first + r) * stride; };
      pack_steps<P, T>(part, n, in.head_dim, out + first * width, width, end - first);
    }
  };
  const auto by_rows = [&](const T* from, int64_t stride, typename P::E* out) {
    pack_rows(from + first * stride, stride, n, in.head_dim, out + first * width, width, end - first);
  };
  by_rows(k, in.k.row, to.k_rows);
  if (backward && P::kPair == 2) {
    by_steps(k, in.k.row, to.k_steps);
    by_rows(v, in.v.row, to.v_rows);
    return;
  }
#if defined(ICAE_FP16)
  if constexpr (ValueProduct<T>::kHalf) {
    if (!backward) {
      return pack_half_values(v, in.v.row, first, end, row.n_keys, in.head_dim, to.half_values(in));
    }
  }
#endif
  by_steps(v, in.v.row, to.v_steps);
}

}  // namespace icae_fast::ICAE_UNIT
