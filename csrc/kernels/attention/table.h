// The attention kernels of a unit.
#pragma once

#include "kernels/attention/backward.h"
#include "kernels/attention/backward_scratch.h"
#include "kernels/attention/few.h"
#include "kernels/attention/few_products.h"
#include "kernels/attention/forward.h"
#include "kernels/attention/forward_scratch.h"
#include "kernels/attention/layout.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"

namespace icae_fast::ICAE_UNIT {

// Bytes of one thread's scratch for either forward kernel.
template <class T>
static int64_t forward_scratch_bytes(const AttentionInput& in) {
  int64_t tile = 0, few = 0;
  ForwardScratch<T>(in, Arena{nullptr}, &tile);
  FewScratch<T>(in, Arena{nullptr}, &few);
  return at_least(tile, few);
}

template <class T>
static int64_t scratch_bytes(const AttentionInput& in, bool backward) {
  return backward ? backward_scratch_bytes<T>(in) : forward_scratch_bytes<T>(in);
}

template <class T>
constexpr AttentionKernels attention_kernels() {
  return {Product<T>::kTiles ? kTileDepth : kPad,
          packed_bytes<T>,
          scratch_bytes<T>,
          partial_bytes<T>,
          pack_keys<T>,
          forward_tile<T>,
          forward_few<T>,
          backward_slice<T>,
          sum_slices<T>};
}

}  // namespace icae_fast::ICAE_UNIT
