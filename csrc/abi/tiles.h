// AMX tiles.
#pragma once

#include <cstdint>

#include "abi/numbers.h"

namespace icae_fast {

// The product that the unit for AMX works with: ATen's brgemm, behind pointers because kernels do not know torch.
// C (m, n) (+)= A (m, k) B, where A and C are matrices by rows and B is (k / 2, ld_b, 2).
struct TileProduct {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
                   const bf16* a, const bf16* b, float* c);
  void (*release)();  // gives a thread's tile registers back
};
extern const TileProduct tile_product;  // in common/tiles.cpp

}  // namespace icae_fast
