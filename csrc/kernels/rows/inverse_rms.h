// The factor of every RMS norm.
#pragma once

#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

// 1 / sqrt(mean(y^2) + eps)
template <class T>
ICAE_INLINE typename Elem<T>::C inverse_rms(const T* y, int64_t dim, double eps) {
  using C = typename Elem<T>::C;
  V<C> squares = {};
  for_vectors<Vec<C>::kWidth>(dim, [&](int64_t d, int64_t n) {
    const V<C> x = load_up_to(y + d, n);
    squares += x * x;
  });
  return C(1 / __builtin_sqrt(double(sum<C>(squares)) / double(dim) + eps));
}

}  // namespace icae_fast::ICAE_UNIT
