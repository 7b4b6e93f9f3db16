// The bf16 GEMM: one product of up to two terms with an epilogue, cut into panels of columns.
#pragma once

#include <cstdint>

#include "abi/numbers.h"

namespace icae_fast {

// A panel is 32 columns of the result in two halves of 16. The epilogue needs two columns at once (the pair that
// RoPE rotates, or a gate and its up); the halves bring such columns together.
constexpr int64_t kHalf = 16;
// Rows of one register tile: 12 x 2 vectors of sums, 2 of weights and a broadcast fill 27 of 32 registers.
constexpr int64_t kTileRows = 12;
// Rows at a multiple of 2 KiB map to the same sets of the first-level cache: the 12 rows of a tile share 8 or 16
// places. Copied rows are one cache line further apart.
constexpr int64_t kRowGap = 32;
inline bool rows_alias(int64_t row) { return row * 2 % 2048 == 0; }
// Most panels per call, and the same where rows of x are widened.
constexpr int64_t kMostPanels = 4, kMostWidePanels = 8;

// One product x W^T of the sum. Either operand may be transposed, with k as its rows.
struct GemmTerm {
  const void* x;  // (rows, k), or (k, rows)
  int64_t x_row;
  const void* w;  // (columns, k), or (k, columns)
  int64_t w_row, k;
  bool x_transposed, w_transposed;
};

// Epilogue: y = factor * sum; heads rotated by RoPE; silu(gate) * up.
enum class GemmEpilogue : int { kStore, kRope, kSwiglu };

// First column of each half of a panel, and its number of columns.
struct Halves {
  int64_t column[2], n[2];
};

// y = epilogue(sum of the terms + bias) in bf16, summed in fp32.
struct Gemm {
  GemmTerm terms[2];
  int64_t n_terms, rows, columns;  // columns of the sum; for kSwiglu those of gate, then those of up
  GemmEpilogue epilogue;
  const void* bias;  // (columns), or null
  void* y;
  int64_t y_row;
  float factor;            // kStore
  int64_t head_dim;        // kRope
  const float *cos, *sin;  // kRope: (T, head_dim / 2), contiguous
  const int64_t* table_rows;
  void* kept;  // kSwiglu: receives gate and up (rows, columns), contiguous, or null

  int64_t panels_per_head() const { return ceil_div(head_dim / 2, kHalf); }
  int64_t panels() const {
    if (epilogue == GemmEpilogue::kStore) return ceil_div(columns, 2 * kHalf);
    return epilogue == GemmEpilogue::kSwiglu ? ceil_div(columns / 2, kHalf)
                                             : columns / head_dim * panels_per_head();
  }
  Halves halves(int64_t panel) const {
    if (epilogue == GemmEpilogue::kStore) {
      const int64_t first = panel * 2 * kHalf, left = columns - first;
      return {{first, first + kHalf}, {at_most(left, kHalf), at_least(0, at_most(left - kHalf, kHalf))}};
    }
    const int64_t size = epilogue == GemmEpilogue::kSwiglu ? columns / 2 : head_dim / 2;
    const int64_t parts = epilogue == GemmEpilogue::kSwiglu ? panels() : panels_per_head();
    const int64_t part = panel % parts * kHalf, first = panel / parts * head_dim + part,
                  n = at_most(kHalf, size - part);
    return {{first, first + size}, {n, n}};
  }
};

struct GemmKernels {
  bool widens;  // whether a call widens its rows of x, and so should have many panels
  // Bytes of one thread's scratch for calls with up to `panels` panels.
  int64_t (*scratch_bytes)(const Gemm&, int64_t panels);
  // Pack the panels' weights and compute their columns for rows [row_begin, row_end).
  void (*run)(const Gemm&, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
              void* scratch);
};

}  // namespace icae_fast
