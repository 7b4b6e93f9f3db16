// Passes over the rows of projected heads: q/k RMS norm, RoPE, their gradient, and dropout.

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

// 1 / sqrt(mean(y^2) + eps)
template <class T>
ICAE_INLINE typename Elem<T>::C inverse_rms(const T* y, int64_t dim, double eps) {
  using C = typename Elem<T>::C;
  V<C> squares = {};
  in_parts<Vec<C>::kWidth>(dim, [&](int64_t d, int64_t n) {
    const V<C> x = get(y + d, n);
    squares += x * x;
  });
  return C(1 / __builtin_sqrt(double(sum<C>(squares)) / double(dim) + eps));
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
      in_parts<W>(half, [&](int64_t d, int64_t n) {
        V<C> a = get(y + d, n), b = get(y + half + d, n);
        if (weight != nullptr) {
          a = a * inverse * get(weight + d, n);
          b = b * inverse * get(weight + half + d, n);
        }
        const V<C> cos = get(r.cos + d, n), sin = get(r.sin + d, n);
        put(y + d, a * cos - b * sin, n);
        put(y + half + d, b * cos + a * sin, n);
      });
    }
  }
}

// y = the gradient before the norm, from the gradient of the rotated heads.
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
      // Rotated back, and times the norm's weight.
      const auto turned = [&](int64_t d, int64_t n, V<C>& a, V<C>& b) {
        const V<C> cos = get(r.cos + d, n), sin = get(r.sin + d, n);
        const V<C> ga = get(grad + d, n), gb = get(grad + half + d, n);
        a = ga * cos + gb * sin;
        b = gb * cos - ga * sin;
        if (weight != nullptr) {
          a *= get(weight + d, n);
          b *= get(weight + half + d, n);
        }
      };
      C inverse = 1, along = 0;
      if (weight != nullptr) {
        V<C> products = {};
        in_parts<W>(half, [&](int64_t d, int64_t n) {
          V<C> a, b;
          turned(d, n, a, b);
          products += a * get(before + d, n) + b * get(before + half + d, n);
        });
        inverse = inverse_rms(before, p.head_dim, p.eps);
        along = inverse * inverse * inverse * sum<C>(products) / C(p.head_dim);
      }
      in_parts<W>(half, [&](int64_t d, int64_t n) {
        V<C> a, b;
        turned(d, n, a, b);
        if (weight != nullptr) {
          a = a * inverse - get(before + d, n) * along;
          b = b * inverse - get(before + half + d, n) * along;
        }
        put(y + d, a, n);
        put(y + half + d, b, n);
      });
    }
  }
}

// ---- dropout -------------------------------------------------------------------------------------------------

// The hash of icae_fast/ops/_dropout.py. Plain loops: the compiler vectorises them for each unit.
ICAE_INLINE uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

ICAE_INLINE uint32_t row_hash(const DropoutMask& mask, int64_t row) {
  return mix(mask.key + static_cast<uint32_t>(mask.rows == nullptr ? row : mask.rows[row]));
}

template <class T>
static void drop(const DropoutMask& mask, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                 int64_t cols, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t h = row_hash(mask, row);
    const T* from = static_cast<const T*>(src) + (mask.rows == nullptr ? row : mask.rows[row]) * src_stride;
    T* __restrict__ to = static_cast<T*>(dst) + row * dst_stride;
    for (int64_t c = 0; c < cols; ++c) to[c] = mix(h + static_cast<uint32_t>(c)) >= mask.floor ? from[c] : T{0};
  }
}

template <class T>
static void add_kept(const DropoutMask& mask, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                     int64_t cols, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t h = row_hash(mask, row);
    const T* from = static_cast<const T*>(src) + row * src_stride;
    T* __restrict__ to = static_cast<T*>(dst) + row * dst_stride;
    for (int64_t c = 0; c < cols; ++c) {
      const auto kept = mix(h + static_cast<uint32_t>(c)) >= mask.floor ? to_compute(from[c]) : 0;
      assign(to + c, to_compute(to[c]) + kept);
    }
  }
}
