// q/k norm, RoPE and dropout.
#pragma once

#include <cstdint>

namespace icae_fast {

// Norm and RoPE over the heads of `rows` rows; `table_rows` says which row of cos and sin each one takes.
struct HeadsPass {
  void* y;             // forward: changed in place; backward: the gradient that is written
  const void* before;  // backward with norm: the values before the norm
  const void* grad;    // backward: the gradient that comes in
  int64_t y_stride, before_stride, grad_stride, grad_head_stride;
  int64_t heads, head_dim;
  const void *cos, *sin;  // (T, head_dim / 2), contiguous; float, or double for double
  const int64_t* table_rows;
  const void* norm;  // (head_dim), or null
  double eps;
};

struct DropoutMask {
  uint32_t key, threshold;
  const int64_t* rows;  // the number of each row in x, or null when they are all of x
};

struct HeadsKernels {
  void (*forward)(const HeadsPass&, int64_t begin, int64_t end);
  void (*backward)(const HeadsPass&, int64_t begin, int64_t end);
  // dst = src where kept, else 0. `rows` picks rows of src; dst has as many rows as there are picked.
  void (*apply_dropout)(const DropoutMask&, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                        int64_t cols, int64_t begin, int64_t end);
  // dst += src where kept; here `rows` only numbers the rows of the mask.
  void (*add_dropout)(const DropoutMask&, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                      int64_t cols, int64_t begin, int64_t end);
};

}  // namespace icae_fast
