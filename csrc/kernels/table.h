// What the torch side and the per-ISA units agree on: plain structs of pointers and strides, and one table of
// function pointers a unit. Nothing here is compiled for a special instruction set, so that the inline functions
// are the same in every unit that includes them.
#pragma once

#include <cstdint>

// GCC before 12 and Clang before 14 do not know AVX512-FP16.
#if defined(__x86_64__) && __has_include(<avx512fp16intrin.h>)
#define ICAE_BUILDS_FP16
#endif

namespace icae_fast {

// A bfloat16 as it lies in memory; arithmetic is in the units.
struct __attribute__((may_alias)) bf16 {
  uint16_t bits;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- attention -----------------------------------------------------------------------------------------------

// A query tile is up to kLanes (position, query head) pairs that share one key/value head. 48 is a multiple of
// every vector width here and of the usual group sizes 1, 2, 3, 4, 6, 8, 12 and 16.
constexpr int64_t kLanes = 48;
// Packed keys of a row, and packed head dimensions, are padded with zeros to a multiple of this or more: no
// micro-kernel has more rows.
constexpr int64_t kPad = 8;
// Keys that a task packs, a multiple of all tiles of keys.
constexpr int64_t kPackedKeys = 256;
// With this many lanes or fewer in a row, packing its keys costs more than it saves: at 32 rows of 300 keys, groups
// of 3 heads of 64, bf16, one thread with AVX-512, 3 lanes take 1.9 ms and packed 7.4, 12 lanes 3.9 and 7.6, 15
// lanes 6.7 and 7.5.
constexpr int64_t kFewLanes = 12;

// Element strides of a (T, H, D) tensor whose last stride is 1.
struct Strided {
  const void* data;
  int64_t row, head;
};

struct AttentionInput {
  Strided q, k, v;
  int64_t q_heads, kv_heads, head_dim, n_queries;
  double scale;
  int64_t window;                // 0 for no window
  int64_t packed_keys;           // of all rows together, for one key/value head
  bool one_head_packed = false;  // what is packed is of one key/value head, that which a call is about

  int64_t packed_heads() const { return one_head_packed ? 1 : kv_heads; }
  int64_t group() const { return q_heads / kv_heads; }
  int64_t heads_per_tile() const { return at_most(group(), kLanes); }
  int64_t head_chunks() const { return ceil_div(group(), heads_per_tile()); }
  int64_t positions_per_tile() const { return kLanes / heads_per_tile(); }
};

// One row of the pack: where its queries and keys are. n_keys counts the keys in use. Queries are the last ones of
// the row, or stand where `positions` says, counted from the row's first key.
struct AttentionRow {
  int64_t q_begin, n_queries, k_begin, n_keys;
  int64_t packed_begin;                // where its packed keys begin; a multiple of key_pad
  int64_t partial_begin;               // backward: where its slices' partial sums begin, in keys
  int64_t n_slices;                    // backward: into how many tasks the queries of a key/value head are cut
  int64_t key_pad;                     // the kernels'
  const int32_t* positions = nullptr;  // of the queries, less `key_position`
  int64_t key_position = 0;

  int64_t position(int64_t query) const {
    return positions == nullptr ? query + n_keys - n_queries : positions[query] - key_position;
  }
  int64_t padded_keys() const { return round_up(n_keys, key_pad); }
  int64_t n_tiles(const AttentionInput& in) const {
    return ceil_div(n_queries, in.positions_per_tile()) * in.head_chunks();
  }
};

// Results of the queries from `first` on, `n` of them.
struct AttentionOutput {
  void* out;  // (n, q_heads, head_dim), contiguous; in the compute type where `partial`
  void* lse;  // (q_heads, n), contiguous
  int64_t first, n;
  bool partial;
};

struct AttentionGradient {
  Strided dout, out;
  const void *dlse, *lse;  // (q_heads, n_queries), contiguous
  void *dq, *dk, *dv;      // contiguous
  void* partial;           // slices' sums of dk, then of dv
  int64_t partial_keys;    // of all rows and slices together, for one key/value head
};

// The tile of queries that the same thread is likely to take soon, if there is one.
struct NextTile {
  const AttentionRow* row = nullptr;
  int64_t kv_head = 0, tile = 0;
};

struct AttentionKernels {
  int64_t key_pad;  // what packed keys of a row are padded to a multiple of
  // Bytes of packed keys and values for all key/value heads, and of one thread's scratch.
  int64_t (*packed_bytes)(const AttentionInput&, bool backward);
  int64_t (*scratch_bytes)(const AttentionInput&, bool backward);
  int64_t (*partial_bytes)(const AttentionInput&, const AttentionGradient&);

  // Keys from `first`, a multiple of kPackedKeys, to `last` or the end of the row.
  void (*pack)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t first, int64_t last,
               bool backward, void* packed);
  // Attends to the keys of `n_rows` rows, one after the other, all of the same queries, and asks for the next
  // tile's rows of q and of the output meanwhile.
  void (*tile)(const AttentionInput&, const AttentionRow* rows, int64_t n_rows, int64_t kv_head, int64_t tile,
               const NextTile&, const void* packed, void* scratch, const AttentionOutput&);
  void (*few)(const AttentionInput&, const AttentionRow&, int64_t kv_head, void* scratch, const AttentionOutput&);
  void (*slice)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t slice, const void* packed,
                void* scratch, const AttentionGradient&);
  void (*sum_slices)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t first, int64_t last,
                     const AttentionGradient&);
};

// ---- heads: q/k norm, RoPE, dropout --------------------------------------------------------------------------

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
  uint32_t key, floor;
  const int64_t* rows;  // the number of each row in x, or null when they are all of x
};

struct HeadsKernels {
  void (*forward)(const HeadsPass&, int64_t begin, int64_t end);
  void (*backward)(const HeadsPass&, int64_t begin, int64_t end);
  // dst = src where kept, else 0. `rows` picks rows of src; dst has as many rows as there are picked.
  void (*drop)(const DropoutMask&, const void* src, int64_t src_stride, void* dst, int64_t dst_stride, int64_t cols,
               int64_t begin, int64_t end);
  // dst += src where kept; here `rows` only numbers the rows of the mask.
  void (*add_kept)(const DropoutMask&, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                   int64_t cols, int64_t begin, int64_t end);
};

// ---- rows: RMS norm, SwiGLU ----------------------------------------------------------------------------------

// RMS norm over rows of `size` elements, all tensors contiguous.
struct NormPass {
  const void *x, *residual;  // residual may be null
  const void* weight;
  void* sum;  // forward: x + residual, rounded; null without a residual
  void* y;
  const void *dy, *dsum;  // backward: the gradients that come in; dsum may be null
  void* dx;               // backward, where x is the sum
  int64_t size;
  double eps;
};

// silu(gate) * up over rows of gate_up (rows, 2 size), all tensors contiguous.
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

// ---- decoding ------------------------------------------------------------------------------------------------

// What becomes of the sums of a product with few rows: stored or added to y in the compute type; silu(gate) * up in
// the type of x, where columns are those of gate and then those of up.
enum class After : int { kStore, kAdd, kSwiglu };

// y = x W^T + bias for a few rows of x, each row of weights read once from where it lies.
struct StreamedProduct {
  const void* x;  // (rows, k), contiguous
  int64_t rows, k;
  const void* w;  // (columns, k)
  int64_t w_row, columns;
  const void* bias;  // (columns), or null
  After after;
  void* y;
  int64_t y_row;

  int64_t outputs() const { return after == After::kSwiglu ? columns / 2 : columns; }
};

// Rows in the compute type to rows in the type of the weights and back, and single heads.
struct DecodeKernels {
  void (*product)(const StreamedProduct&, int64_t begin, int64_t end);  // of the outputs from begin up to end
  void (*widen)(const void* from, int64_t n, void* to);
  void (*norm)(const void* from, const void* weight, double eps, int64_t n, void* to);
  void (*head)(const void* from, const void* norm, double eps, const void* cos, const void* sin, int64_t dim,
               void* to);
  void (*merge)(const void* const* outs, const void* const* lses, int64_t n, int64_t dim, void* to);
  int64_t (*largest)(const void* values, int64_t n);  // where the first of the largest is, or the first NaN
};

// ---- GEMM ----------------------------------------------------------------------------------------------------

// A panel is 32 columns of the result, in two halves of 16, so that two columns which are needed together (the two
// that RoPE turns, a gate and its up) can be put side by side.
constexpr int64_t kHalf = 16;
// Rows of one register tile: 12 x 2 vectors of sums, 2 of weights and a broadcast fill 27 of 32 registers.
constexpr int64_t kTileRows = 12;
// Rows that lie a multiple of 2 KiB apart push each other out of the first-level cache: the 12 of a tile share 8 or
// 16 of its places. Copies of rows are kept apart by a cache line more.
constexpr int64_t kRowGap = 32;
inline bool rows_collide(int64_t row) { return row * 2 % 2048 == 0; }
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
enum class Finish : int { kStore, kRotate, kSwiglu };

// Columns of a panel's halves, and how many of them there are.
struct Halves {
  int64_t column[2], n[2];
};

// y = finish(sum of the terms + bias) in bf16, summed up in fp32.
struct Gemm {
  GemmTerm terms[2];
  int64_t n_terms, rows, columns;  // columns of the sum; with kSwiglu those of gate, then those of up
  Finish finish;
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
    if (finish == Finish::kStore) return ceil_div(columns, 2 * kHalf);
    return finish == Finish::kSwiglu ? ceil_div(columns / 2, kHalf) : columns / head_dim * panels_per_head();
  }
  Halves halves(int64_t panel) const {
    if (finish == Finish::kStore) {
      const int64_t first = panel * 2 * kHalf, left = columns - first;
      return {{first, first + kHalf}, {at_most(left, kHalf), at_least(0, at_most(left - kHalf, kHalf))}};
    }
    const int64_t size = finish == Finish::kSwiglu ? columns / 2 : head_dim / 2;
    const int64_t parts = finish == Finish::kSwiglu ? panels() : panels_per_head();
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

// ---- AMX -----------------------------------------------------------------------------------------------------

// The product that the unit for AMX works with: ATen's brgemm, behind pointers because kernels do not know torch.
// C (m, n) (+)= A (m, k) B, where A and C are matrices by rows and B is (k / 2, ld_b, 2).
struct TileProduct {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
                   const bf16* a, const bf16* b, float* c);
  void (*release)();  // gives a thread's tile registers back
};
extern const TileProduct tile_product;  // in common/tiles.cpp

// ---- tables --------------------------------------------------------------------------------------------------

enum class Dtype : int { Float = 0, BFloat16 = 1, Double = 2 };

struct Kernels {
  const char* isa;
  AttentionKernels attention[3];  // by Dtype
  HeadsKernels heads[3];
  RowsKernels rows[3];
  DecodeKernels decode[3];
  GemmKernels gemm;  // of bf16; null in a unit that has none
  // Multiplies as the unit does in bf16, in registers alone, and says how many products that were: tells which of
  // two units is faster. Null where nobody asks.
  int64_t (*bf16_products)();
};

const Kernels& kernels_scalar();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
#if defined(ICAE_BUILDS_FP16)
const Kernels& kernels_avx512_fp16();
#endif
const Kernels& kernels_avx512();
const Kernels& kernels_amx();
#endif

}  // namespace icae_fast
