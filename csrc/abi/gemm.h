// The bf16 GEMM.
#pragma once

#include <cstdint>

#include "abi/numbers.h"

namespace icae_fast {

// A panel is 32 columns of the result, in two halves of 16, so that two columns which are needed together (the two
// that RoPE turns, a gate and its up) can be put side by side.
constexpr int64_t kHalf = 16;
// Rows of one register tile: 12 x 2 vectors of sums, 2 of weights and a broadcast fill 27 of 32 registers.
constexpr int64_t kTileRows = 12;
// Rows that lie a multiple of 2 KiB apart push each other out of the first-level cache: the 12 of a tile share 8 or
// 16 of its places. Copies of rows are kept apart by a cache line more.
constexpr int64_t kRowGap = 32;
inline bool rows_alias(int64_t row) { return row * 2 % 2048 == 0; }
// Panels that one call may be given, and where rows of x are widened.
constexpr int64_t kMostPanels = 4, kMostWidePanels = 8;

// x W^T, one of up to two products that are added up; either operand may lie transposed, with k as its rows.
struct GemmTerm {
  const void* x;  // (rows, k), or (k, rows)
  int64_t x_row;
  const void* w;  // (columns, k), or (k, columns)
  int64_t w_row, k;
  bool x_transposed, w_transposed;
};

// What becomes of the sums: y = factor * sum; heads turned by RoPE; silu(gate) * up.
enum class GemmEpilogue : int { kStore, kRope, kSwiglu };

// Columns of a panel's halves, and how many of them there are.
struct Halves {
  int64_t column[2], n[2];
};

// y = finish(sum of the terms + bias) in bf16, summed up in fp32.
struct Gemm {
  GemmTerm terms[2];
  int64_t n_terms, rows, columns;  // columns of the sum; with kSwiglu those of gate, then those of up
  GemmEpilogue epilogue;
  const void* bias;  // (columns), or null
  void* y;
  int64_t y_row;
  float factor;            // kStore
  int64_t head_dim;        // kRotate
  const float *cos, *sin;  // kRotate: (T, head_dim / 2), contiguous
  const int64_t* table_rows;
  void* kept;  // kSwiglu: where gate and up go (rows, columns), contiguous, or null

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
  bool widens;  // each call widens its rows of x for itself, and so should have many panels
  // Bytes of one thread's scratch for calls with up to `panels` panels.
  int64_t (*scratch_bytes)(const Gemm&, int64_t panels);
  // Packs the panels' weights and computes their columns for the rows from row_begin up to row_end.
  void (*run)(const Gemm&, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
              void* scratch);
};

}  // namespace icae_fast
