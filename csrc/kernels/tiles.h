// bf16 products on AMX tiles, by oneDNN's micro-kernels through ATen's `brgemm`.
//
// This has not run on a CPU with AMX yet. Tests run it on AVX512-BF16, for which oneDNN generates other code behind
// the same call. The expectation: a tile instruction computes 16 x 16 x 32 products in 16 cycles, eight times as
// many as two ports with `vdpbf16ps`, so that softmax and epilogues take most of the remaining time.
//
// Constraints on callers:
// * oneDNN generates a kernel on a thread's first call with a shape, strides and `add`, which takes 0.1 ms (Zen 4).
//   So operands are padded to few shapes: rows to 16, depth to 32.
// * Any depth works, but unless it is a multiple of 32, tiles are reconfigured or copied inside the kernel.
// * A call costs a table look-up, and a tile configuration if the shape changes: some hundred cycles, against the
//   16 of a tile instruction. So a call gets as many rows as fit the caches.
// * The configuration persists until `release`. Other code on this thread that uses tiles would find it wrong.
#pragma once

#include "kernels/unit.h"

namespace icae_fast::ICAE_UNIT {

constexpr int64_t kTileDepth = 32;
// Keys of one packed piece of K^T or V^T. In one matrix, rows could be a multiple of 4 KiB apart and evict each
// other from the first-level cache.
constexpr int64_t kColumnTile = 128;
static_assert(kColumnTile % kTileDepth == 0, "a piece is whole tiles");

// Scope in which a thread may hold tile registers.
template <class P>
struct TileRegisters {
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
#if defined(ICAE_AMX)
    if constexpr (P::kTiles) tile_product.release();
#endif
  }
};

// C (rows, columns) (+)= A (rows, depth) B, where B is (depth / 2, b_row, 2).
template <class E, class C>
ICAE_INLINE void multiply_tiles(const E* a, int64_t a_row, int64_t rows, const E* b, int64_t b_row, int64_t columns,
                                int64_t depth, bool add, C* c, int64_t c_row) {
#if defined(ICAE_AMX)
  tile_product.multiply(rows, columns, depth, a_row, b_row, c_row, add, a, b, c);
#endif
}

}  // namespace icae_fast::ICAE_UNIT
