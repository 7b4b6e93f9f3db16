// Passes over whole rows: RMS norm with residual add, SwiGLU, and their gradients. Everything is read once and
// written once; a row stays in the first-level cache between the two halves of a norm.

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
      in_parts<W>(p.size, [&](int64_t i, int64_t n) { put(sum + i, get(x + i, n) + get(residual + i, n), n); });
      x = sum;
    }
    const C inverse = inverse_rms(x, p.size, p.eps);
    T* y = static_cast<T*>(p.y) + row * p.size;
    in_parts<W>(p.size, [&](int64_t i, int64_t n) { put(y + i, get(x + i, n) * inverse * get(weight + i, n), n); });
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
    in_parts<W>(p.size,
                [&](int64_t i, int64_t n) { products += get(x + i, n) * get(weight + i, n) * get(dy + i, n); });
    const C inverse = inverse_rms(x, p.size, p.eps);
    const C along = inverse * inverse * inverse * sum<C>(products) / C(p.size);
    in_parts<W>(p.size, [&](int64_t i, int64_t n) {
      V<C> v = get(weight + i, n) * get(dy + i, n) * inverse - get(x + i, n) * along;
      if (dsum != nullptr) v += get(dsum + i, n);
      put(dx + i, v, n);
    });
  }
}

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
    in_parts<W>(p.size, [&](int64_t i, int64_t n) {
      const auto g = get(gate + i, n);
      put(y + i, g * sigmoid<T>(g) * get(gate + p.size + i, n), n);
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
    in_parts<W>(p.size, [&](int64_t i, int64_t n) {
      const auto g = get(gate + i, n), up = get(gate + p.size + i, n), grad = get(dy + i, n);
      const auto s = sigmoid<T>(g);
      put(dgate + i, grad * up * s * (C(1) + g * (C(1) - s)), n);
      put(dgate + p.size + i, grad * g * s, n);
    });
  }
}
