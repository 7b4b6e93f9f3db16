// Products and single heads of a token step.
#pragma once

#include <cstdint>

namespace icae_fast {

// What becomes of the sums of a product with few rows: stored or added to y in the compute type; silu(gate) * up in
// the type of x, where columns are those of gate and then those of up.
enum class StreamedEpilogue : int { kStore, kAdd, kSwiglu };

// y = x W^T + bias for a few rows of x, each row of weights read once from where it lies.
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

// Rows in the compute type to rows in the type of the weights and back, and single heads.
struct DecodeKernels {
  void (*product)(const StreamedProduct&, int64_t begin, int64_t end);  // of the outputs from begin up to end
  void (*widen)(const void* from, int64_t n, void* to);
  void (*norm)(const void* from, const void* weight, double eps, int64_t n, void* to);
  void (*norm_rope)(const void* from, const void* norm, double eps, const void* cos, const void* sin, int64_t dim,
                    void* to);
  void (*merge)(const void* const* outs, const void* const* lses, int64_t n, int64_t dim, void* to);
  int64_t (*argmax)(const void* values, int64_t n);  // where the first of the largest is, or the first NaN
};

}  // namespace icae_fast
