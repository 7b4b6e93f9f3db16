// SwiGLU and its gradient. Each element is read and written once.
#pragma once

#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

template <class T>
ICAE_INLINE V<typename Elem<T>::C> sigmoid(V<typename Elem<T>::C> x) {
  using C = typename Elem<T>::C;
  return C(1) / (exp_of_negative<C, Elem<T>::kExpDegree>(x) + C(1));
}

template <class T>
static void swiglu_forward(const SwigluPass& p, int64_t begin, int64_t end) {
  constexpr int W = Vec<typename Elem<T>::C>::kWidth;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.size;
    T* y = static_cast<T*>(p.y) + row * p.size;
    for_vectors<W>(p.size, [&](int64_t i, int64_t n) {
      const auto g = load_up_to(gate + i, n);
      store_up_to(y + i, g * sigmoid<T>(g) * load_up_to(gate + p.size + i, n), n);
    });
  }
}

// dgate = dy up s (1 + gate (1 - s)),    dup = dy gate s,    s = sigmoid(gate)
template <class T>
static void swiglu_backward(const SwigluPass& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.size;
    const T* dy = static_cast<const T*>(p.dy) + row * p.size;
    T* dgate = static_cast<T*>(p.dgate_up) + row * 2 * p.size;
    for_vectors<W>(p.size, [&](int64_t i, int64_t n) {
      const auto g = load_up_to(gate + i, n), up = load_up_to(gate + p.size + i, n), grad = load_up_to(dy + i, n);
      const auto s = sigmoid<T>(g);
      store_up_to(dgate + i, grad * up * s * (C(1) + g * (C(1) - s)), n);
      store_up_to(dgate + p.size + i, grad * g * s, n);
    });
  }
}

}  // namespace icae_fast::ICAE_UNIT
