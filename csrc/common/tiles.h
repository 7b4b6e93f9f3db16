// AMX tiles through torch: ATen's brgemm, which runs oneDNN's micro-kernels. abi/tiles.h declares the product,
// `tile_product`.
#pragma once

namespace icae_fast {

// Whether brgemm would use AMX on this CPU.
bool has_tiles();

// Whether brgemm accepts packed bf16 at the moment. It does not while the user has switched oneDNN off.
bool tiles_enabled();

}  // namespace icae_fast
