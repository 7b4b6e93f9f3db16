// The token-step kernels of a unit.
#pragma once

#include "kernels/decode/rows.h"
#include "kernels/decode/streamed_product.h"
#include "kernels/unit.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
constexpr DecodeKernels decode_kernels() {
  return {streamed_product<T>, widen_row<T>, norm_row<T>, norm_rope_head<T>, merge_head<T>, argmax_first<T>};
}

}  // namespace icae_fast::ICAE_UNIT
