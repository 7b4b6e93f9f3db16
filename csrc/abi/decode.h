// Kernels of a token step: products with a few rows of x, and passes over single rows and heads.
#pragma once

#include <cstdint>

namespace icae_fast {

// Epilogue of a product with a few rows: store the sums or add them to y, both in the compute type, or store
// silu(gate) * up in the type of x. For kSwiglu the columns are those of gate, then those of up.
enum class StreamedEpilogue : int { kStore, kAdd, kSwiglu };

// y = x W^T + bias for a few rows of x. Each row of W is read once, in place.
struct StreamedProduct {
  const void* x;  // (rows, k), contiguous
  int64_t rows, k;
  const void* w;  // (columns, k)
  int64_t w_row, columns;
  const void* bias;  // (columns), or null
  StreamedEpilogue epilogue;
  void* y;
  int64_t y_row;

  int64_t outputs() const { return epilogue == StreamedEpilogue::kSwiglu ? columns / 2 : columns; }
};

// Activations are in the compute type between kernels; inputs of products are in the type of the weights.
struct DecodeKernels {
  void (*product)(const StreamedProduct&, int64_t begin, int64_t end);  // computes outputs [begin, end)
  // Widen a row to the compute type.
  void (*widen)(const void* from, int64_t n, void* to);
  // RMS norm of a row, from the compute type to the weights' type.
  void (*norm)(const void* from, const void* weight, double eps, int64_t n, void* to);
  // Head norm (unless `norm` is null) and RoPE (unless `cos` is null) of one projected head.
  void (*norm_rope)(const void* from, const void* norm, double eps, const void* cos, const void* sin, int64_t dim,
                    void* to);
  // Merge one head's `n` partial results by their log-sum-exps.
  void (*merge)(const void* const* outs, const void* const* lses, int64_t n, int64_t dim, void* to);
  int64_t (*argmax)(const void* values, int64_t n);  // index of the first maximum, or of the first NaN
};

}  // namespace icae_fast
