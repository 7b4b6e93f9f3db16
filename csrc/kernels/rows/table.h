// The row-wise kernels of a unit.
#pragma once

#include "kernels/rows/dropout.h"
#include "kernels/rows/heads.h"
#include "kernels/rows/rms_norm.h"
#include "kernels/rows/swiglu.h"
#include "kernels/unit.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
constexpr HeadsKernels heads_kernels() {
  return {heads_forward<T>, heads_backward<T>, apply_dropout<T>, add_dropout<T>};
}

template <class T>
constexpr RowsKernels rows_kernels() {
  return {norm_forward<T>, norm_backward<T>, swiglu_forward<T>, swiglu_backward<T>};
}

}  // namespace icae_fast::ICAE_UNIT
