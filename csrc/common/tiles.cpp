#include "common/tiles.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "abi/numbers.h"
#include "abi/tiles.h"

namespace icae_fast {
namespace {

void multiply(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const bf16* a,
              const bf16* b, float* c) {
  if (k == 0) {  // oneDNN would ask for 85 GB
    for (int64_t i = 0; i < m && !add; ++i) std::fill_n(c + i * ld_c, n, 0.0f);
    return;
  }
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

void release() { at::native::cpublas::brgemm_release(); }

}  // namespace

bool has_tiles() { return at::native::cpublas::could_pack(at::kBFloat16); }

bool tiles_enabled() { return at::globalContext().userEnabledMkldnn(); }

const TileProduct tile_product{multiply, release};

}  // namespace icae_fast
