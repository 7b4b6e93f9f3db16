// bf16 products on AMX tiles, behind function pointers because kernels do not know torch.
#pragma once

#include <cstdint>

#include "abi/numbers.h"

namespace icae_fast {

// ATen's brgemm: C (m, n) (+)= A (m, k) B. A and C are row-major, B is (k / 2, ld_b, 2).
struct TileProduct {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
                   const bf16* a, const bf16* b, float* c);
  void (*release)();  // release the thread's tile registers
};
extern const TileProduct tile_product;  // common/tiles.cpp

}  // namespace icae_fast
