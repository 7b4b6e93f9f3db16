// Row-wise kernels: RMS norm with residual add, and SwiGLU.
#pragma once

#include <cstdint>

namespace icae_fast {

// RMS norm over rows of `size` elements. All tensors are contiguous.
struct NormPass {
  const void *x, *residual;  // residual may be null
  const void* weight;
  void* sum;  // forward: x + residual, rounded; null without a residual
  void* y;
  const void *dy, *dsum;  // backward: the incoming gradients; dsum may be null
  void* dx;               // backward; x is then the sum
  int64_t size;
  double eps;
};

// silu(gate) * up over rows of gate_up (rows, 2 size). All tensors are contiguous.
struct SwigluPass {
  const void* gate_up;
  void* y;         // (rows, size)
  const void* dy;  // backward
  void* dgate_up;
  int64_t size;
};

struct RowsKernels {
  void (*norm)(const NormPass&, int64_t begin, int64_t end);
  void (*norm_backward)(const NormPass&, int64_t begin, int64_t end);
  void (*swiglu)(const SwigluPass&, int64_t begin, int64_t end);
  void (*swiglu_backward)(const SwigluPass&, int64_t begin, int64_t end);
};

}  // namespace icae_fast
