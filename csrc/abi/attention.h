// Attention: how the two sides describe a packed batch, and the kernels that attend to it.
#pragma once

#include <cstdint>

#include "abi/numbers.h"

namespace icae_fast {

// A query tile is up to kLanes (position, query head) pairs that share one key/value head. 48 is a multiple of
// every vector width and of the usual GQA group sizes 1, 2, 3, 4, 6, 8, 12 and 16.
constexpr int64_t kLanes = 48;
// A row's packed keys, and packed head dimensions, are padded with zeros to a multiple of at least this. No
// micro-kernel has more rows.
constexpr int64_t kPad = 8;
// Keys that one task packs: a multiple of every key tile.
constexpr int64_t kPackedKeys = 256;
// Up to this many lanes, a row's keys are read in place, because packing them costs more than it saves. At 32 rows
// of 300 keys, groups of 3 heads of 64, bf16, one thread with AVX-512: 3 lanes take 1.9 ms in place and 7.4 ms
// packed, 12 lanes 3.9 and 7.6, 15 lanes 6.7 and 7.5.
constexpr int64_t kFewLanes = 12;

// Element strides of a (T, H, D) tensor whose last stride is 1.
struct Strided {
  const void* data;
  int64_t row, head;
};

// One call of attention. Every row of the batch shares it.
struct AttentionInput {
  Strided q, k, v;
  int64_t q_heads, kv_heads, head_dim, n_queries;
  double scale;
  int64_t window;                // sliding window in keys, 0 for none
  int64_t packed_keys;           // packed keys of all rows, for one key/value head
  bool one_head_packed = false;  // only the call's own key/value head is packed

  int64_t packed_heads() const { return one_head_packed ? 1 : kv_heads; }
  int64_t group() const { return q_heads / kv_heads; }
  int64_t heads_per_tile() const { return at_most(group(), kLanes); }
  int64_t head_chunks() const { return ceil_div(group(), heads_per_tile()); }
  int64_t positions_per_tile() const { return kLanes / heads_per_tile(); }
};

// One row of the batch: where its queries and keys are. `n_keys` counts the keys in use. By default the queries are
// the row's last positions; `positions` places them elsewhere.
struct AttentionRow {
  int64_t q_begin, n_queries, k_begin, n_keys;
  int64_t packed_begin;                // where the row's packed keys begin; a multiple of key_pad
  int64_t partial_begin;               // backward: where its slices' partial sums begin, in keys
  int64_t n_slices;                    // backward: number of tasks that share the queries of a key/value head
  int64_t key_pad;                     // the kernels' key_pad
  const int32_t* positions = nullptr;  // position of each query; `key_position` is that of the first key
  int64_t key_position = 0;

  int64_t position(int64_t query) const {
    return positions == nullptr ? query + n_keys - n_queries : positions[query] - key_position;
  }
  int64_t padded_keys() const { return round_up(n_keys, key_pad); }
  int64_t n_tiles(const AttentionInput& in) const {
    return ceil_div(n_queries, in.positions_per_tile()) * in.head_chunks();
  }
};

// Results of the `n` queries that begin at query `first`.
struct AttentionOutput {
  void* out;  // (n, q_heads, head_dim), contiguous; in the compute type if `partial`
  void* lse;  // (q_heads, n), contiguous
  int64_t first, n;
  bool partial;
};

// Inputs and results of the backward.
struct AttentionGradient {
  Strided dout, out;
  const void *dlse, *lse;  // (q_heads, n_queries), contiguous
  void *dq, *dk, *dv;      // contiguous
  void* partial;           // the slices' sums of dk, then of dv
  int64_t partial_keys;    // keys of all rows' slices, for one key/value head
};

// The query tile that this thread will probably run next, to be prefetched. `row` is null if there is none.
struct NextTile {
  const AttentionRow* row = nullptr;
  int64_t kv_head = 0, tile = 0;
};

struct AttentionKernels {
  int64_t key_pad;  // packed keys of a row are padded to a multiple of this
  // Bytes of packed keys and values of all key/value heads, of one thread's scratch, and of the slices' sums.
  int64_t (*packed_bytes)(const AttentionInput&, bool backward);
  int64_t (*scratch_bytes)(const AttentionInput&, bool backward);
  int64_t (*partial_bytes)(const AttentionInput&, const AttentionGradient&);

  // Pack the row's keys and values from `first`, a multiple of kPackedKeys, to `last` or the end of the row.
  void (*pack)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t first, int64_t last,
               bool backward, void* packed);
  // Attend to the packed keys of `n_rows` rows, one after the other, for one tile of queries that they share.
  // Prefetches the next tile's rows of q and of the output.
  void (*tile)(const AttentionInput&, const AttentionRow* rows, int64_t n_rows, int64_t kv_head, int64_t tile,
               const NextTile&, const void* packed, void* scratch, const AttentionOutput&);
  // Attend to keys in place, for at most kFewLanes lanes.
  void (*few)(const AttentionInput&, const AttentionRow&, int64_t kv_head, void* scratch, const AttentionOutput&);
  // Backward: write dq of one slice and sum its share of dk and dv.
  void (*slice)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t slice, const void* packed,
                void* scratch, const AttentionGradient&);
  // Backward: reduce the slices' sums to dk and dv of keys [first, last).
  void (*sum_slices)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t first, int64_t last,
                     const AttentionGradient&);
};

}  // namespace icae_fast
