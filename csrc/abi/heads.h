// Head norm, RoPE and dropout.
#pragma once

#include <cstdint>

namespace icae_fast {

// RMS norm and RoPE over the heads of each row. `table_rows` maps a row to its row of cos and sin; null means the
// same row.
struct HeadsPass {
  void* y;             // forward: changed in place; backward: the gradient to write
  const void* before;  // backward with norm: the values before the norm
  const void* grad;    // backward: the incoming gradient
  int64_t y_stride, before_stride, grad_stride, grad_head_stride;
  int64_t heads, head_dim;
  const void *cos, *sin;  // (T, head_dim / 2), contiguous; double for double, else float
  const int64_t* table_rows;
  const void* norm;  // (head_dim), or null
  double eps;
};

struct DropoutMask {
  // A hash of (key, row, column) below `threshold` drops the element.
  uint32_t key, threshold;
  const int64_t* rows;  // row of x that each row is, or null if they are all rows of x
};

struct HeadsKernels {
  void (*forward)(const HeadsPass&, int64_t begin, int64_t end);
  void (*backward)(const HeadsPass&, int64_t begin, int64_t end);
  // dst = src where kept, else 0. `rows` selects rows of src; dst has one row for each.
  void (*apply_dropout)(const DropoutMask&, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                        int64_t cols, int64_t begin, int64_t end);
  // dst += src where kept. `rows` only gives each row's number in the mask.
  void (*add_dropout)(const DropoutMask&, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                      int64_t cols, int64_t begin, int64_t end);
};

}  // namespace icae_fast
