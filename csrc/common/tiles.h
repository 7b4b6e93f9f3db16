// AMX tiles as torch lends them: ATen's brgemm, which runs oneDNN's micro-kernels. The product itself is
// tile_product, declared in kernels/table.h.
#pragma once

namespace icae_fast {

// Whether brgemm would use AMX on this CPU.
bool has_tiles();

// Whether brgemm takes packed bf16 at all just now; not where the user has switched oneDNN off.
bool tiles_enabled();

}  // namespace icae_fast
