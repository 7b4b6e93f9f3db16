// Head norm and RoPE over rows of projected heads, and their gradient.
#pragma once

#include "kernels/rows/inverse_rms.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

template <class C>
struct Rotation {
  const C *cos, *sin;
};

template <class T>
static Rotation<typename Elem<T>::C> rotation_of(const HeadsPass& p, int64_t row) {
  using C = typename Elem<T>::C;
  const int64_t at = (p.table_rows == nullptr ? row : p.table_rows[row]) * (p.head_dim / 2);
  return {static_cast<const C*>(p.cos) + at, static_cast<const C*>(p.sin) + at};
}

template <class T>
static void heads_forward(const HeadsPass& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t half = p.head_dim / 2;
  const T* weight = static_cast<const T*>(p.norm);
  for (int64_t row = begin; row < end; ++row) {
    const auto r = rotation_of<T>(p, row);
    for (int64_t h = 0; h < p.heads; ++h) {
      T* y = static_cast<T*>(p.y) + row * p.y_stride + h * p.head_dim;
      const C inverse = weight == nullptr ? C(1) : inverse_rms(y, p.head_dim, p.eps);
      for_vectors<W>(half, [&](int64_t d, int64_t n) {
        V<C> a = load_up_to(y + d, n), b = load_up_to(y + half + d, n);
        if (weight != nullptr) {
          a = a * inverse * load_up_to(weight + d, n);
          b = b * inverse * load_up_to(weight + half + d, n);
        }
        const V<C> cos = load_up_to(r.cos + d, n), sin = load_up_to(r.sin + d, n);
        store_up_to(y + d, a * cos - b * sin, n);
        store_up_to(y + half + d, b * cos + a * sin, n);
      });
    }
  }
}

// y = gradient before the norm, from the gradient of the rotated heads.
template <class T>
static void heads_backward(const HeadsPass& p, int64_t begin, int64_t end) {
  using C = typename Elem<T>::C;
  constexpr int W = Vec<C>::kWidth;
  const int64_t half = p.head_dim / 2;
  const T* weight = static_cast<const T*>(p.norm);
  for (int64_t row = begin; row < end; ++row) {
    const auto r = rotation_of<T>(p, row);
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* grad = static_cast<const T*>(p.grad) + row * p.grad_stride + h * p.grad_head_stride;
      const T* before = static_cast<const T*>(p.before) + row * p.before_stride + h * p.head_dim;
      T* y = static_cast<T*>(p.y) + row * p.y_stride + h * p.head_dim;
      // The gradient rotated back, times the norm's weight.
      const auto rotated_back = [&](int64_t d, int64_t n, V<C>& a, V<C>& b) {
        const V<C> cos = load_up_to(r.cos + d, n), sin = load_up_to(r.sin + d, n);
        const V<C> ga = load_up_to(grad + d, n), gb = load_up_to(grad + half + d, n);
        a = ga * cos + gb * sin;
        b = gb * cos - ga * sin;
        if (weight != nullptr) {
          a *= load_up_to(weight + d, n);
          b *= load_up_to(weight + half + d, n);
        }
      };
      C inverse = 1, along = 0;
      if (weight != nullptr) {
        V<C> products = {};
        for_vectors<W>(half, [&](int64_t d, int64_t n) {
          V<C> a, b;
          rotated_back(d, n, a, b);
          products += a * load_up_to(before + d, n) + b * load_up_to(before + half + d, n);
        });
        inverse = inverse_rms(before, p.head_dim, p.eps);
        along = inverse * inverse * inverse * sum<C>(products) / C(p.head_dim);
      }
      for_vectors<W>(half, [&](int64_t d, int64_t n) {
        V<C> a, b;
        rotated_back(d, n, a, b);
        if (weight != nullptr) {
          a = a * inverse - load_up_to(before + d, n) * along;
          b = b * inverse - load_up_to(before + half + d, n) * along;
        }
        store_up_to(y + d, a, n);
        store_up_to(y + half + d, b, n);
      });
    }
  }
}

}  // namespace icae_fast::ICAE_UNIT
