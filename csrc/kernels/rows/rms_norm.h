// RMS norm with residual add, and its gradient. Each element is read and written once: a row stays in the
// first-level cache between the two halves of a norm.
#pragma once

#include "kernels/rows/inverse_rms.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
static void norm_forward(const NormPass& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.size;
    if (p.residual != nullptr) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.size;
      T* sum = static_cast<T*>(p.sum) + row * p.size;
      for_vectors<W>(p.size, [&](int64_t i, int64_t n) {
        store_up_to(sum + i, load_up_to(x + i, n) + load_up_to(residual + i, n), n);
      });
      x = sum;
    }
    const C inverse = inverse_rms(x, p.size, p.eps);
    T* y = static_cast<T*>(p.y) + row * p.size;
    for_vectors<W>(p.size, [&](int64_t i, int64_t n) {
      store_up_to(y + i, load_up_to(x + i, n) * inverse * load_up_to(weight + i, n), n);
    });
  }
}

// dx = dsum + r (w dy) - x r^3 mean(x w dy),    r = 1 / sqrt(mean(x^2) + eps)
template <class T>
static void norm_backward(const NormPass& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.size;
    const T* dy = static_cast<const T*>(p.dy) + row * p.size;
    const T* dsum = p.dsum == nullptr ? nullptr : static_cast<const T*>(p.dsum) + row * p.size;
    T* dx = static_cast<T*>(p.dx) + row * p.size;
    V<C> products = {};
    for_vectors<W>(p.size, [&](int64_t i, int64_t n) {
      products += load_up_to(x + i, n) * load_up_to(weight + i, n) * load_up_to(dy + i, n);
    });
    const C inverse = inverse_rms(x, p.size, p.eps);
    const C along = inverse * inverse * inverse * sum<C>(products) / C(p.size);
    for_vectors<W>(p.size, [&](int64_t i, int64_t n) {
      V<C> v = load_up_to(weight + i, n) * load_up_to(dy + i, n) * inverse - load_up_to(x + i, n) * along;
      if (dsum != nullptr) v += load_up_to(dsum + i, n);
      store_up_to(dx + i, v, n);
    });
  }
}

}  // namespace icae_fast::ICAE_UNIT
